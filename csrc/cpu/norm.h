// RMSNorm and LayerNorm: what their launchers and the kernels built for each instruction set share. Plain structs, as in kernels.h.
#pragma once

#include <cstdint>

#include "../formats/parameters.h"

namespace coat {

// One float array, or none.
struct FloatArray {
  const void* data;
  DType dtype;
};

// gain and shift [segments, row]: a segment is segment_rows rows in a run.
struct NormFactors {
  FloatArray gain, shift;
  bool plus_one;
  int64_t segment_rows;
};

struct NormJob {
  const void* x;
  DType dtype;
  int64_t rows, row;
  NormFactors factors;
  bool center;
  float eps;
  int fmt, group_size;
  void* y;
  void* codes;    // null: nothing is saved. fmt 0: values of x's dtype
  float* scale;   // [rows, groups]
  float* rstd;    // [rows]
  float* y_amax;  // [rows, groups], or null
};

struct NormFromCodesJob {
  const void* codes;
  const float* scale;
  DType codes_dtype;  // of fmt 0
  int64_t rows, row;
  NormFactors factors;
  int fmt, group_size;
  void* y;
  DType dtype;
};

struct NormBackwardJob {
  const void* dy;
  DType dtype;
  int64_t rows, row;
  const void* codes;
  const float* scale;
  DType codes_dtype;  // of fmt 0
  const float* rstd;
  NormFactors factors;  // shift is not read
  bool center;
  int fmt, group_size;
  void* dx;  // null: not needed
};

// Floats of a row in a kernel's memory: a whole number of vectors of any instruction set, on cache lines.
constexpr int64_t padded_row(int64_t row) { return (row + 63) / 64 * 64; }

// Rows of memory that kernels work in.
constexpr int kNormMemory = 3, kNormBackwardMemory = 3;

}  // namespace coat
