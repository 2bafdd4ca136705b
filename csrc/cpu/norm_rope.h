// RMSNorm of heads with rotary embedding: what its launchers and the kernels built for each instruction set share.
#pragma once

#include "norm.h"

namespace coat {

// A row is one head of one token: row r belongs to token r / heads of all batches, and a batch has `tokens`.
struct NormRopeShape {
  DType dtype;
  int64_t rows, row, heads, tokens;
  FloatArray weight, first_weight;  // [row]; the second, or none, of the first tokens of each batch
  int64_t first_tokens;
  FloatArray cos, sin;  // [table_tokens, row], or none; taken up in turn by the tokens of all batches
  int64_t table_tokens;
  bool interleaved;
};

struct NormRopeJob {
  NormRopeShape shape;
  const void* x;
  float eps;
  void* y;
  float* rstd;  // [rows]
};

struct NormRopeBackwardJob {
  NormRopeShape shape;
  const void *dy, *y;
  const float* rstd;
  void* dx;  // null: not needed
};

constexpr int kNormRopeMemory = 13;

}  // namespace coat
