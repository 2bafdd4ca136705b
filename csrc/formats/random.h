// The counter-based generator of stochastic rounding: README.md, "Stochastic rounding".
#pragma once

#include "codecs.h"

namespace coat {

constexpr uint32_t kMix1 = 0x85EBCA6Bu, kMix2 = 0xC2B2AE35u, kGolden = 0x9E3779B9u;
constexpr uint32_t kStreamExpAvg = 0, kStreamExpAvgSq = 1, kStreamParam = 2;

// MurmurHash3's finalizer (public domain).
COAT_INLINE uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= kMix1;
  h ^= h >> 13;
  h *= kMix2;
  return h ^ (h >> 16);
}

COAT_INLINE uint32_t stream_key(uint32_t seed, uint32_t step, uint32_t tensor_index, uint32_t stream) {
  return mix(mix(mix(seed) + step) + 4 * tensor_index + stream);
}

// The random word that `counter` (element >> 2 of a moment, element >> 1 of a parameter) draws from.
COAT_INLINE uint32_t random_word(uint32_t key, uint32_t counter) { return mix(key + counter * kGolden); }

// 16 random bits of parameter element i.
COAT_INLINE uint32_t random16(uint32_t key, uint64_t i) {
  return (random_word(key, static_cast<uint32_t>(i >> 1)) >> (16 * (i & 1))) & 0xFFFF;
}

}  // namespace coat
