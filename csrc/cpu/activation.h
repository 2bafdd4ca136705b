// Jobs of the activation functions.
#pragma once

#include "../formats/parameters.h"
#include "../formats/scaled8.h"

namespace coat {

enum class Activation : int { kGeluTanh = 0, kGelu = 1, kSilu = 2 };

// x, or one of gate and up: where its values lie, and its codes.
struct ActivationOperand {
  const void* values;  // [rows, width], `stride` elements from row to row; null: read the codes
  int64_t stride;
  uint8_t* codes;  // [rows, width]; null: none are read or written
  float* scale;    // [rows, groups of a row]
};

// y = f(gate) up, and its gradient; without `up.values` and `up.codes` y = f(gate).
struct ActivationJob {
  Activation kind;
  Scaled8 format;
  int64_t rows, width;
  DType value_dtype;  // of the operands' values
  DType dtype;        // of y or dy, and of out
  ActivationOperand gate, up;
  const void* dy;   // [rows, width]; null: forward
  void* out;        // y or dx [rows, width]; of a gated function's gradient [rows, 2 width]
  float* out_amax;  // largest finite magnitude of y's groups, [rows, groups of a row], or null
  bool gate_first;  // which half of out is the gate's

  bool gated() const { return up.values != nullptr || up.codes != nullptr; }
};

void activation(ActivationJob job, int threads);

}  // namespace coat
