// Jobs of stand-alone quantize and dequantize in groups of a row.
#pragma once

#include "../formats/parameters.h"
#include "../formats/scaled8.h"

namespace coat {

struct QuantizeActivationJob {
  Scaled8 format;
  const void* x;  // [rows, row]
  DType x_dtype;
  int64_t rows, row;
  uint8_t* codes;
  float* scale;  // [rows, groups of a row]
};

struct DequantizeActivationJob {
  Scaled8 format;
  const uint8_t* codes;  // [rows, row]
  const float* scale;    // [rows, groups of a row]
  int64_t rows, row;
  void* out;
  DType out_dtype;
};

void quantize_activation(QuantizeActivationJob job, int threads);
void dequantize_activation(DequantizeActivationJob job, int threads);

}  // namespace coat
