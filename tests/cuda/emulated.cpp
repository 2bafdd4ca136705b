// The kernels of csrc/cuda as C functions for tests/cuda/conftest.py.
#include "emulator.h"
//
#include "../../csrc/cuda/blockwise_quant.cu"
#include "../../csrc/cuda/step_8bit.cu"

using namespace coat;

COAT_EMULATE(quantize_blockwise, QuantizeArguments)
COAT_EMULATE(dequantize_blockwise, QuantizeArguments)
COAT_EMULATE(advance_8bit, StepArguments)
COAT_EMULATE(step_8bit_adamw, StepArguments)
COAT_EMULATE(step_8bit_lion, StepArguments)
COAT_EMULATE(step_8bit_momentum, StepArguments)
COAT_EMULATE(step_8bit_adamw_float32, StepArguments)
COAT_EMULATE(step_8bit_lion_float32, StepArguments)
COAT_EMULATE(step_8bit_momentum_float32, StepArguments)

// z[i] = x[i] / absmax[i] as the kernels divide.
extern "C" void emulate_divide(const float* x, const float* absmax, float* z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = divide(x[i], absmax[i], __frcp_rn(absmax[i]));
}
