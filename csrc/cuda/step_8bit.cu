// The fused elementwise step on blockwise 8-bit states (or float32 ones, of small tensors), all tensors of a bucket in one launch.
//
//   adamw     m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//             p = (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//   lion      p = (1 - lr wd) p - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g
//   momentum  m = beta1 m + g;  p = nesterov ? g + beta1 m : m
//
// Moments are rounded after each operation, as the reference's are, and not contracted: codes and absmax are its own, bit for bit.
// The update of p takes the root and the quotient of the special function unit, 2^-22 of it.
#include "blockwise.h"

namespace coat {

enum class Rule : int { kAdamW = 0, kLion = 1, kMomentum = 2 };

// A row of ops/pointer_table.py; absent arrays are null.
struct Row {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  float *exp_avg_absmax, *exp_avg_sq_absmax;
  int8_t* residual;
  float* step;
  int64_t numel, index;
};

// What follows from a tensor's own step count: lr / (1 - beta1^t) (lion: lr), 1 / sqrt(1 - beta2^t), 1 - lr weight_decay.
struct alignas(16) Correction {
  float step_size, root, decay, unused;
};

// Pointers that may be null: lr (else lr_value), grad_scale, found_inf. log_beta1, log_beta2: natural logarithms, of AdamW's only.
struct StepArguments {
  const Row* rows;
  const int2* tiles;  // row, number of the tile in its tensor
  Correction* corrections;
  const float *lr, *grad_scale, *found_inf;
  double log_beta1, log_beta2, lr_value, weight_decay;
  float beta1, rest1, beta2, rest2, eps;
  uint32_t seed;
  int32_t n_rows, n_tiles, rule, param_dtype, grad_dtype, param_rounding, block_size, maximize, nesterov;
};

__device__ inline bool is_skipped(const StepArguments& arguments) { return arguments.found_inf != nullptr && *arguments.found_inf != 0; }

// step += 1 and the corrections that follow, a thread for each row: on the device, so that found_inf needs no synchronization.
extern "C" __global__ void __launch_bounds__(kThreads, 2) advance_8bit(StepArguments arguments) {
  if (is_skipped(arguments)) return;
  const double lr = arguments.lr != nullptr ? *arguments.lr : arguments.lr_value;
  const bool adamw = arguments.rule == static_cast<int>(Rule::kAdamW);
  for (int64_t row = blockIdx.x * kThreads + threadIdx.x; row < arguments.n_rows; row += gridDim.x * kThreads) {
    float* const count = arguments.rows[row].step;
    const float t = *count + 1;
    *count = t;
    const double correction1 = adamw ? -expm1(t * arguments.log_beta1) : 1.0, correction2 = adamw ? -expm1(t * arguments.log_beta2) : 1.0;
    arguments.corrections[row] = {static_cast<float>(lr / correction1), static_cast<float>(1.0 / sqrt(correction2)),
                                  static_cast<float>(1.0 - lr * arguments.weight_decay), 0.0f};
  }
}

__device__ inline float fast_sqrt(float x) {
#ifdef __CUDA_ARCH__
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}

__device__ inline float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
#else
  return 1.0f / x;
#endif
}

__device__ inline float blend(float beta, float old, float rest, float x) { return __fadd_rn(__fmul_rn(beta, old), __fmul_rn(rest, x)); }

template <Rule kRule, bool kQuantized>
struct Step {
  static constexpr int kMoments = kRule == Rule::kAdamW ? 2 : 1;

  struct Shared {
    Dynamic8Tables tables[kMoments];
    WarpMaxima<kMoments> maxima;
  };

  // A thread's elements of one tile.
  struct Part {
    const StepArguments* arguments;
    const Row* row;
    Correction correction;
    int64_t first;
    int count;
    float p[kElements], g[kElements], m[kElements], v[kElements];
  };

  __device__ static void load_states(const Part& part, const Shared& shared, uint2 m_codes, uint2 v_codes, const Raw* raw, float* m,
                                     float* v) {
    if (kQuantized) {
      const int64_t block = part.first / part.arguments->block_size;
      decode_codes(shared.tables[0].map, m_codes, part.count > 0 ? part.row->exp_avg_absmax[block] : 0.0f, m);
      if (kMoments == 2) {
        decode_codes(shared.tables[kMoments - 1].map, v_codes, part.count > 0 ? part.row->exp_avg_sq_absmax[block] : 0.0f, v);
      }
    } else {
      to_floats(raw[0], DType::kFloat32, m);
      if (kMoments == 2) to_floats(raw[kMoments - 1], DType::kFloat32, v);
    }
  }

  __device__ static void load(const Shared& shared, Part* part) {
    const StepArguments& arguments = *part->arguments;
    const Row& row = *part->row;
    const DType param_dtype = static_cast<DType>(arguments.param_dtype), grad_dtype = static_cast<DType>(arguments.grad_dtype);
    const bool split = kRule != Rule::kMomentum && arguments.param_rounding == static_cast<int>(ParamRounding::kSplit);
    Raw params = {}, states[kMoments] = {};
    uint2 m_codes = {}, v_codes = {}, residuals = {};
    const Raw grads = load_raw(row.grad, grad_dtype, part->first, part->count);
    if (kRule != Rule::kMomentum) params = load_raw(row.param, param_dtype, part->first, part->count);
    if (kQuantized) {
      // what lies past a tensor's end decodes to zero: it must not be a block's maximum
      m_codes = load_bytes(row.exp_avg, part->first, part->count, kDynamic8Zero);
      if (kMoments == 2) v_codes = load_bytes(row.exp_avg_sq, part->first, part->count, 0);
    } else {
      states[0] = load_raw(row.exp_avg, DType::kFloat32, part->first, part->count);
      if (kMoments == 2) states[kMoments - 1] = load_raw(row.exp_avg_sq, DType::kFloat32, part->first, part->count);
    }
    if (split) residuals = load_bytes(row.residual, part->first, part->count, 0);
    to_floats(grads, grad_dtype, part->g);
    load_states(*part, shared, m_codes, v_codes, states, part->m, part->v);
    if (kRule == Rule::kMomentum) return;
    if (split) {
      for (int j = 0; j < kElements; ++j) {
        const uint16_t high = static_cast<uint16_t>(params.word[j / 2] >> (16 * (j % 2)));
        part->p[j] = split_decode(high, static_cast<int8_t>(byte_of(residuals, j)));
      }
    } else {
      to_floats(params, param_dtype, part->p);
    }
  }

  __device__ static void advance(float grad_factor, Part* part) {
    const StepArguments& arguments = *part->arguments;
    const float step_size = part->correction.step_size, root = part->correction.root, decay = part->correction.decay;
    if (grad_factor != 1) {
      for (int j = 0; j < kElements; ++j) part->g[j] *= grad_factor;
    }
    for (int j = 0; j < kElements; ++j) {
      const float g = part->g[j], old = part->m[j];
      if (kRule == Rule::kAdamW) {
        const float m = blend(arguments.beta1, old, arguments.rest1, g);
        const float v = __fadd_rn(__fmul_rn(arguments.beta2, part->v[j]), __fmul_rn(__fmul_rn(arguments.rest2, g), g));
        part->m[j] = m;
        part->v[j] = v;
        part->p[j] = part->p[j] * decay - step_size * m * fast_reciprocal(fast_sqrt(v) * root + arguments.eps);
      } else if (kRule == Rule::kLion) {
        const float direction = blend(arguments.beta1, old, arguments.rest1, g);
        part->m[j] = blend(arguments.beta2, old, arguments.rest2, g);
        // NaN reaches the parameter, as it does through torch.sign
        const float signed_size = direction > 0 ? step_size : direction < 0 ? -step_size : direction;
        part->p[j] = part->p[j] * decay - signed_size;
      } else {
        const float m = __fadd_rn(__fmul_rn(arguments.beta1, old), g);
        part->m[j] = m;
        part->p[j] = arguments.nesterov ? __fadd_rn(g, __fmul_rn(arguments.beta1, m)) : m;
      }
    }
  }

  __device__ static void store_params(const Part& part) {
    const StepArguments& arguments = *part.arguments;
    const Row& row = *part.row;
    const DType dtype = static_cast<DType>(arguments.param_dtype);
    const ParamRounding rounding = static_cast<ParamRounding>(arguments.param_rounding);
    if (kRule == Rule::kMomentum || dtype == DType::kFloat32 || rounding == ParamRounding::kNearest) {
      store_raw(row.param, dtype, part.first, part.count, from_floats(part.p, dtype));
    } else if (rounding == ParamRounding::kStochastic) {
      const uint32_t key = stream_key(arguments.seed, static_cast<uint32_t>(*row.step), static_cast<uint32_t>(row.index), kStreamParam);
      store_raw(row.param, dtype, part.first, part.count, from_floats_stochastic(part.p, dtype, key, part.first));
    } else {
      Raw params = {};
      uint32_t residual[kElements];
      for (int j = 0; j < kElements; ++j) {
        int8_t rest;
        params.word[j / 2] |= static_cast<uint32_t>(split_encode(part.p[j], &rest)) << (16 * (j % 2));
        residual[j] = static_cast<uint8_t>(rest);
      }
      store_raw(row.param, dtype, part.first, part.count, params);
      store_bytes(row.residual, part.first, part.count, pack_bytes(residual));
    }
  }

  __device__ static void store_floats(const Row& row, Part* part) {
    store_raw(row.exp_avg, DType::kFloat32, part->first, part->count, from_floats(part->m, DType::kFloat32));
    if (kMoments == 1) return;
    for (int j = 0; j < kElements; ++j) {
      if (float_bits(part->v[j]) == kInfBits && is_finite(part->g[j])) part->v[j] = kFloatMax;
    }
    store_raw(row.exp_avg_sq, DType::kFloat32, part->first, part->count, from_floats(part->v, DType::kFloat32));
  }

  __device__ static void store_codes(const Row& row, int turn, Shared* shared, Part* part) {
    const int block_size = part->arguments->block_size;
    uint32_t top[kMoments];
    top[0] = largest_finite(part->m, nullptr);
    if (kMoments == 2) top[kMoments - 1] = largest_finite(part->v, part->g);
    block_max<kMoments>(top, block_size, turn, &shared->maxima);
    const uint2 m_codes = encode_signed(shared->tables[0].entry, part->m, bits_float(top[0]));
    store_bytes(row.exp_avg, part->first, part->count, m_codes);
    store_absmax(row.exp_avg_absmax, part->first, part->count, block_size, top[0]);
    if (kMoments == 1) return;
    const uint32_t v_top = top[kMoments - 1];
    const uint2 v_codes = encode_nonzero(shared->tables[kMoments - 1].entry, part->v, bits_float(v_top));
    store_bytes(row.exp_avg_sq, part->first, part->count, v_codes);
    store_absmax(row.exp_avg_sq_absmax, part->first, part->count, block_size, v_top);
  }

  __device__ static void run(const StepArguments& arguments, Shared* shared) {
    if (is_skipped(arguments)) return;
    if (kQuantized) {
      load_tables(kDynamic8Signed, &shared->tables[0]);
      if (kMoments == 2) load_tables(kDynamic8Unsigned, &shared->tables[kMoments - 1]);
      __syncthreads();
    }
    float grad_factor = arguments.grad_scale != nullptr ? 1.0f / *arguments.grad_scale : 1.0f;
    if (arguments.maximize) grad_factor = -grad_factor;
    int turn = 0;
    for (int64_t i = blockIdx.x; i < arguments.n_tiles; i += gridDim.x, turn ^= 1) {
      const int2 tile = arguments.tiles[i];
      const Row& row = arguments.rows[tile.x];
      Part part;
      part.arguments = &arguments;
      part.row = &row;
      part.correction = arguments.corrections[tile.x];
      part.first = static_cast<int64_t>(tile.y) * kTile + threadIdx.x * kElements;
      part.count = elements_left(row.numel, part.first);
      load(*shared, &part);
      advance(grad_factor, &part);
      store_params(part);
      if (kQuantized) {
        store_codes(row, turn, shared, &part);
      } else {
        store_floats(row, &part);
      }
    }
  }
};

#define COAT_STEP_KERNEL(NAME, RULE, QUANTIZED)                                             \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) NAME(StepArguments arguments) { \
    __shared__ Step<RULE, QUANTIZED>::Shared shared;                                        \
    Step<RULE, QUANTIZED>::run(arguments, &shared);                                         \
  }

COAT_STEP_KERNEL(step_8bit_adamw, Rule::kAdamW, true)
COAT_STEP_KERNEL(step_8bit_lion, Rule::kLion, true)
COAT_STEP_KERNEL(step_8bit_momentum, Rule::kMomentum, true)
COAT_STEP_KERNEL(step_8bit_adamw_float32, Rule::kAdamW, false)
COAT_STEP_KERNEL(step_8bit_lion_float32, Rule::kLion, false)
COAT_STEP_KERNEL(step_8bit_momentum_float32, Rule::kMomentum, false)

}  // namespace coat
