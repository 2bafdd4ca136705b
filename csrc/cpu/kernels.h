// What launch.cpp and the kernels built for each instruction set share: plain structs, so that no code of one build is merged
// into another's.
#pragma once

#include <cstdint>

#include "../formats/codecs.h"
#include "../formats/parameters.h"
#include "activation.h"
#include "activation_quant.h"
#include "blockwise.h"
#include "came_8bit.h"
#include "gated_residual.h"
#include "norm.h"
#include "norm_rope.h"
#include "tables.h"
#include "tensor_quant.h"

namespace coat {

// How one array of groups is encoded. Table pointers are null where the codec has no use for them.
struct GroupFormat {
  Codec codec;
  bool quantized;     // false: values, no codes
  bool packed;        // two codes a byte
  bool has_signs;     // false promises values >= 0
  bool keep_nonzero;  // no non-zero value takes code 0
  bool stochastic;
  bool expand;
  int group_size;
  int range_q15;
  int max_code;
  int low_mask;
  uint8_t nan_code;            // of a non-finite element
  const DecodeTable* decode;   // [256] by metadata byte; softsign8 has none
  const BucketTable* buckets;  // e4m3, e5m2, e2m1
  const DitherTable* dither;   // log8: [256] by metadata byte
};

GroupFormat make_format(Codec codec, int group_size, bool has_signs, bool keep_nonzero, bool stochastic);

struct QuantizeJob {
  GroupFormat format;
  const void* x;
  DType x_dtype;
  int64_t numel;
  uint32_t key;
  uint8_t* codes;
  float* amax;
  uint8_t* k16;
};

struct DequantizeJob {
  GroupFormat format;
  const uint8_t* codes;
  const float* amax;
  const uint8_t* k16;
  int64_t numel;
  void* out;
  DType out_dtype;
};

// What every tensor of a step shares.
struct StepJob {
  GroupFormat exp_avg, exp_avg_sq;
  DType param_dtype, grad_dtype;
  ParamRounding param_rounding;
  float beta1, beta2, eps;
  float decay;            // 1 - lr * weight_decay
  float grad_to_exp_avg;  // (1 - beta1) / grad_scale, negative to maximize
  float grad_to_root_sq;  // sqrt(1 - beta2) / grad_scale
  float inv_grad_scale;
};

// One tensor of a step.
struct StepRow {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  float* amax;   // [n_groups, 2]
  uint8_t* k16;  // [n_groups, 2]
  int8_t* residual;
  int64_t numel;
  int64_t first_group;   // among the groups of all tensors
  float step_size;       // lr / (1 - beta1^t)
  float inv_bias2_root;  // 1 / sqrt(1 - beta2^t)
  uint32_t keys[3];      // of the generator, by stream
};

// The kernels of one instruction set; each works on groups [begin, end) of its job, came_8bit on a whole tensor.
struct Kernels {
  const char* name;
  void (*quantize)(const QuantizeJob&, int64_t begin, int64_t end);
  void (*dequantize)(const DequantizeJob&, int64_t begin, int64_t end);
  void (*step)(const StepJob&, const StepRow&, int64_t begin, int64_t end);
  void (*quantize_blockwise)(const QuantizeBlockwiseJob&, int64_t begin, int64_t end);
  void (*dequantize_blockwise)(const DequantizeBlockwiseJob&, int64_t begin, int64_t end);
  void (*step_8bit)(const Step8bitJob&, const Step8bitRow&, int64_t begin, int64_t end);
  void (*came_8bit)(const CameJob&, const CameRow&, float* memory);
  void (*quantize_activation)(const QuantizeActivationJob&, int64_t begin, int64_t end);
  void (*dequantize_activation)(const DequantizeActivationJob&, int64_t begin, int64_t end);
  void (*group_amax)(const GroupAmaxJob&, int64_t begin, int64_t end);
  void (*quantize_tensor)(const QuantizeTensorJob&, int64_t begin, int64_t end);
  void (*dequantize_tensor)(const DequantizeTensorJob&, int64_t begin, int64_t end);
  void (*transpose_bytes)(const TransposeJob&, int64_t begin, int64_t end);
  void (*norm)(const NormJob&, float* memory, int64_t begin, int64_t end);
  void (*norm_from_codes)(const NormFromCodesJob&, float* memory, int64_t begin, int64_t end);
  void (*norm_backward)(const NormBackwardJob&, float* memory, int64_t begin, int64_t end, float* dgain, float* dshift);
  void (*norm_rope)(const NormRopeJob&, float* memory, int64_t begin, int64_t end);
  void (*norm_rope_backward)(const NormRopeBackwardJob&, float* memory, int64_t begin, int64_t end, float* dweight, float* dfirst_weight);
  void (*gated_residual)(const GatedResidualJob&, float* memory, int64_t begin, int64_t end);
  void (*gated_residual_backward)(const GatedResidualBackwardJob&, float* memory, int64_t begin, int64_t end, float* dgate);
  void (*activation)(const ActivationJob&, int64_t begin, int64_t end);
};

constexpr int kBlock = 1024;  // elements that a kernel works on at a time: its buffers stay in L1
constexpr int kMinGroup = 32, kMaxGroup = 256;

// clang-format off: one line for each kernel, in the order of Kernels
#define COAT_DECLARE_KERNELS(isa) namespace isa { \
  void quantize(const QuantizeJob&, int64_t begin, int64_t end); \
  void dequantize(const DequantizeJob&, int64_t begin, int64_t end); \
  void step(const StepJob&, const StepRow&, int64_t begin, int64_t end); \
  void quantize_blockwise(const QuantizeBlockwiseJob&, int64_t begin, int64_t end); \
  void dequantize_blockwise(const DequantizeBlockwiseJob&, int64_t begin, int64_t end); \
  void step_8bit(const Step8bitJob&, const Step8bitRow&, int64_t begin, int64_t end); \
  void came_8bit(const CameJob&, const CameRow&, float* memory); \
  void quantize_activation(const QuantizeActivationJob&, int64_t begin, int64_t end); \
  void dequantize_activation(const DequantizeActivationJob&, int64_t begin, int64_t end); \
  void group_amax(const GroupAmaxJob&, int64_t begin, int64_t end); \
  void quantize_tensor(const QuantizeTensorJob&, int64_t begin, int64_t end); \
  void dequantize_tensor(const DequantizeTensorJob&, int64_t begin, int64_t end); \
  void transpose_bytes(const TransposeJob&, int64_t begin, int64_t end); \
  void norm(const NormJob&, float* memory, int64_t begin, int64_t end); \
  void norm_from_codes(const NormFromCodesJob&, float* memory, int64_t begin, int64_t end); \
  void norm_backward(const NormBackwardJob&, float* memory, int64_t begin, int64_t end, float* dgain, float* dshift); \
  void norm_rope(const NormRopeJob&, float* memory, int64_t begin, int64_t end); \
  void norm_rope_backward(const NormRopeBackwardJob&, float* memory, int64_t begin, int64_t end, float* dweight, float* dfirst_weight); \
  void gated_residual(const GatedResidualJob&, float* memory, int64_t begin, int64_t end); \
  void gated_residual_backward(const GatedResidualBackwardJob&, float* memory, int64_t begin, int64_t end, float* dgate); \
  void activation(const ActivationJob&, int64_t begin, int64_t end); \
  constexpr Kernels kKernels{#isa, \
    quantize, \
    dequantize, \
    step, \
    quantize_blockwise, \
    dequantize_blockwise, \
    step_8bit, \
    came_8bit, \
    quantize_activation, \
    dequantize_activation, \
    group_amax, \
    quantize_tensor, \
    dequantize_tensor, \
    transpose_bytes, \
    norm, \
    norm_from_codes, \
    norm_backward, \
    norm_rope, \
    norm_rope_backward, \
    gated_residual, \
    gated_residual_backward, \
    activation, \
  }; }
// clang-format on
COAT_DECLARE_KERNELS(generic)
COAT_DECLARE_KERNELS(avx2)
COAT_DECLARE_KERNELS(avx512)
#undef COAT_DECLARE_KERNELS

}  // namespace coat
