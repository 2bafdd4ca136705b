// Gated residuals: what their launchers and the kernels built for each instruction set share.
#pragma once

#include "norm.h"

namespace coat {

// gate: [segments, row], a segment being segment_rows rows in a run.
struct GatedResidualJob {
  const void *residual, *x;
  DType dtype;
  int64_t rows, row, segment_rows;
  FloatArray gate;
  int fmt, group_size;
  void *y, *codes;  // codes null: x is not saved
  float* scale;
};

struct GatedResidualBackwardJob {
  const void* dy;
  DType dtype;
  int64_t rows, row, segments;
  FloatArray gate;
  const void* codes;  // read where the gradient of gate is wanted
  const float* scale;
  DType codes_dtype;  // of fmt 0
  int fmt, group_size;
  void* dx;  // null: not needed
};

constexpr int kGatedResidualMemory = 2;

}  // namespace coat
