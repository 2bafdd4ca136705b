// The parameters and gradients of one block of a fused step as float32, in place where they are float32 already.
#pragma once

#include "convert.h"

namespace coat::COAT_ISA {

// How a tensor's parameters are stored.
struct ParamStorage {
  void* data;
  DType dtype;
  ParamRounding rounding;
  int8_t* residual;  // of kSplit
  uint32_t key;      // of the generator, for kStochastic
};

// Elements first .. first + count - 1: the array itself where it is float32 and needs no padding, else `staged`, with zeros up to `padded`.
static inline float* open_params(const ParamStorage& params, int64_t first, int count, int padded, float* staged) {
  void* const from = at(params.data, params.dtype, first);
  if (params.rounding == ParamRounding::kSplit) {
    load_split(from, params.residual + first, count, padded, staged);
  } else if (params.dtype == DType::kFloat32 && count == padded) {
    return static_cast<float*>(from);
  } else {
    load_floats(from, params.dtype, count, padded, staged);
  }
  return staged;
}

static inline const float* open_grads(const void* grads, DType dtype, int64_t first, int count, int padded, float* staged) {
  const void* const from = at(grads, dtype, first);
  if (dtype == DType::kFloat32 && count == padded) return static_cast<const float*>(from);
  load_floats(from, dtype, count, padded, staged);
  return staged;
}

// Stores what open_params returned; nothing to do where that was the array itself.
static inline void close_params(const ParamStorage& params, int64_t first, int count, const float* values) {
  void* const to = at(params.data, params.dtype, first);
  if (values == to) return;
  if (params.rounding == ParamRounding::kSplit) {
    store_split(values, count, to, params.residual + first);
  } else if (params.rounding == ParamRounding::kStochastic && params.dtype != DType::kFloat32) {
    store_stochastic(values, count, params.dtype, params.key, first, to);
  } else {
    store_floats(values, count, params.dtype, to);
  }
}

// v that overflowed from a finite gradient is held at the largest float32: the parameter stands still there.
static inline void hold_overflow(const float* grad, float inv_grad_scale, int n, float* v) {
  for (int i = 0; i < n; ++i) {
    const bool finite_grad = is_finite(grad[i] * inv_grad_scale);
    if (finite_grad && float_bits(v[i]) == kInfBits) v[i] = kFloatMax;
  }
}

}  // namespace coat::COAT_ISA
