// The random generator of README.md, "Stochastic rounding", a vector of words at a time.
#pragma once

#include "../formats/random.h"
#include "simd.h"

namespace coat::COAT_ISA {

// Calls use(i, words) with the words of counters counter + i on, for i = 0, kLanes, ... under n.
template <typename Use>
COAT_SIMD_INLINE void random_words(uint32_t key, uint32_t counter, int n, Use use) {
  I next = add(set1(static_cast<int32_t>(key + counter * kGolden)), mul(iota(), set1(static_cast<int32_t>(kGolden))));
  const I step = set1(static_cast<int32_t>(kGolden * static_cast<uint32_t>(kLanes)));
  for (int i = 0; i < n; i += kLanes) {
    I h = mul(xor_(next, shr<16>(next)), set1(static_cast<int32_t>(kMix1)));
    h = mul(xor_(h, shr<13>(h)), set1(static_cast<int32_t>(kMix2)));
    use(i, xor_(h, shr<16>(h)));
    next = add(next, step);
  }
}

}  // namespace coat::COAT_ISA
