// The kernels of csrc/cuda as C functions for tests/cuda/conftest.py.
#include "emulator.h"
//
#include "../../csrc/cuda/blockwise_quant.cu"
#include "../../csrc/cuda/came_8bit.cu"
#include "../../csrc/cuda/step_8bit.cu"

using namespace coat;

COAT_EMULATE(quantize_blockwise, QuantizeArguments)
COAT_EMULATE(dequantize_blockwise, QuantizeArguments)
COAT_EMULATE(advance_8bit, StepArguments)
COAT_EMULATE(came_8bit, CameArguments)
COAT_EMULATE(step_8bit_adamw, StepArguments)
COAT_EMULATE(step_8bit_lion, StepArguments)
COAT_EMULATE(step_8bit_momentum, StepArguments)
COAT_EMULATE(step_8bit_adamw_float32, StepArguments)
COAT_EMULATE(step_8bit_lion_float32, StepArguments)
COAT_EMULATE(step_8bit_momentum_float32, StepArguments)

// How many quotients of 24-bit numbers are rounded wrongly of those where `divide` could be wrong at all, whose number goes to *tried.
// x 2^shift = halfway divisor + distance, `halfway` an odd number of 25 bits: x / divisor is off the middle between two float32 by
// distance / (2 divisor) units, and |distance| <= 3 is within 2^-23.
extern "C" int64_t emulate_divisions(int64_t* tried) {
  int64_t wrong = 0;
  *tried = 0;
  for (uint64_t divisor = 1 << 23; divisor < 1 << 24; ++divisor) {
    const int zeros = divisor % 4 == 0 ? 2 : divisor % 2 == 0;
    if (zeros == 2) continue;  // a multiple of 4 has no such distance
    uint64_t inverse = divisor >> zeros;
    for (int i = 0; i < 6; ++i) inverse *= 2 - (divisor >> zeros) * inverse;
    const float by = static_cast<float>(divisor), reciprocal = __frcp_rn(by);
    for (int shift = 24; shift <= 25; ++shift) {
      for (int64_t distance = -3; distance <= 3; ++distance) {
        if (distance == 0 || distance % (1 << zeros) != 0) continue;
        const uint64_t period = uint64_t{1} << (shift - zeros);
        const uint64_t root = static_cast<uint64_t>(-distance / (1 << zeros)) * inverse % period;
        for (uint64_t halfway = root; halfway < 1 << 25; halfway += period) {
          if (halfway < 1 << 24 || halfway % 2 == 0) continue;
          const uint64_t product = halfway * divisor + static_cast<uint64_t>(distance), x = product >> shift;
          if (x << shift != product || x < 1 << 23 || x >= 1 << 24) continue;
          *tried += 1;
          wrong += divide(static_cast<float>(x), by, reciprocal) != static_cast<float>(x) / by;
        }
      }
    }
  }
  return wrong;
}
