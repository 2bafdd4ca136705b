// What launch_blockwise.cpp and the blockwise kernels of each instruction set share, and the entry points that the Python module binds.
#pragma once

#include <cstdint>

#include "../formats/dynamic8.h"
#include "../formats/parameters.h"

namespace coat {

constexpr int kMinBlockSize = 64, kMaxBlockSize = 4096;

// Tables of the signed or the unsigned map.
const Dynamic8Tables& dynamic8_tables(bool is_signed);

struct QuantizeBlockwiseJob {
  const Dynamic8Tables* tables;
  bool is_signed;
  int block_size;
  const void* x;
  DType x_dtype;
  int64_t numel;
  uint8_t* codes;
  float* absmax;
};

struct DequantizeBlockwiseJob {
  const Dynamic8Tables* tables;
  int block_size;
  const uint8_t* codes;
  const float* absmax;
  int64_t numel;
  void* out;
  DType out_dtype;
};

enum class Rule : int { kAdamW = 0, kLion = 1, kMomentum = 2 };

// What every tensor of a step shares.
struct Step8bitJob {
  Rule rule;
  bool quantized;
  int block_size;
  DType param_dtype, grad_dtype;
  ParamRounding param_rounding;
  const Dynamic8Tables *signed_map, *unsigned_map;
  float beta1, beta2, eps, lr;
  float decay;           // 1 - lr * weight_decay
  float grad_to_first;   // share of the gradient in adamw's m, in lion's update, in momentum's m
  float grad_to_second;  // in lion's m; its root in adamw's root of v
  float inv_grad_scale;
  bool nesterov;
};

// One tensor of a step.
struct Step8bitRow {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  float *exp_avg_absmax, *exp_avg_sq_absmax;
  int8_t* residual;
  int64_t numel;
  int64_t first_group;   // number of its first block among those of all tensors
  float step_size;       // lr / (1 - beta1^t)
  float inv_bias2_root;  // 1 / sqrt(1 - beta2^t)
  uint32_t param_key;    // of the generator
};

void quantize_blockwise(const QuantizeBlockwiseJob& job, int threads);
void dequantize_blockwise(const DequantizeBlockwiseJob& job, int threads);

struct Step8bitFormat {
  Rule rule;
  bool quantized;
  int block_size;
  DType param_dtype, grad_dtype;
  ParamRounding param_rounding;
  uint32_t seed;
};

struct Step8bitHyperparameters {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize, nesterov;
  double grad_scale;
};

// table: int64 [n_tensors, 10], the columns of ops/step_8bit/settings.py. Counts every tensor's step up.
void step_8bit(const int64_t* table, int64_t n_tensors, const Step8bitFormat& format, const Step8bitHyperparameters& hyper, int threads);

}  // namespace coat
