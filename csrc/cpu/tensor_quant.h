// Jobs of two-stage group scaling: the maxima of groups, and codes under one scale for a tensor or a row.
#pragma once

#include "../formats/parameters.h"
#include "../formats/scaled8.h"

namespace coat {

struct GroupAmaxJob {
  const void* x;  // [rows, row]
  DType x_dtype;
  int64_t rows, row;
  int group_size;
  float* group_amax;  // [rows, groups of a row]
};

// A row is what has one scale: a tensor's row, or all of it.
struct QuantizeTensorJob {
  int fmt;
  const void* x;  // [rows, row]
  DType x_dtype;
  int64_t rows, row;
  const float* group_amax;  // [rows, groups]
  int64_t groups;
  uint8_t* codes;
  const float* amax;  // [rows], at least 2^-100
};

struct DequantizeTensorJob {
  int fmt;
  const uint8_t* codes;  // [rows, row]
  const float* scale;    // [rows]
  int64_t rows, row;
  void* out;
  DType out_dtype;
};

struct TransposeJob {
  const uint8_t* bytes;  // [rows, columns]
  int64_t rows, columns;
  uint8_t* out;  // [columns, rows]
};

void group_amax(GroupAmaxJob job, int threads);
// Finds job.amax and writes `scale` [rows].
void quantize_tensor(QuantizeTensorJob job, float* scale, int threads);
void dequantize_tensor(const DequantizeTensorJob& job, int threads);
void transpose_bytes(const TransposeJob& job, int threads);

constexpr int kTransposeTile = 64;

}  // namespace coat
