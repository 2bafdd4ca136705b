// float32 to codes of the dynamic map and back, a block at a time. Codes equal those of formats/dynamic8.h bit for bit.
#pragma once

#include "blockwise.h"
#include "simd.h"

namespace coat::COAT_ISA {

constexpr int kBlockStride = 64;  // blocks are padded to a multiple of this: four vectors at most

COAT_SIMD_INLINE F decode(const float* map, const uint8_t* codes) { return gather(map, load_u8(codes)); }

// Index of the magnitude nearest to |z| <= 1.
COAT_SIMD_INLINE I nearest_magnitude(const uint32_t* entry, F z) {
  const I bits = as_int(abs(z)), base = set1(kDynamic8Base);
  const I bucket = sub(umax(shr<16>(bits), base), base);
  return shr<16>(add(and_(bits, set1(0xFFFF)), gather(entry, bucket)));
}

COAT_SIMD_INLINE I encode_signed(const uint32_t* entry, F x, F absmax) {
  constexpr float kLowest = -dynamic8_magnitude(true, kDynamic8Zero);  // -1 has no code: what lies under the lowest entry becomes it
  const F z = max(div(x, absmax), set1(kLowest));
  const I k = nearest_magnitude(entry, z), zero = set1(kDynamic8Zero);
  return select(less(z, set1(0.0f)), sub(zero, k), add(zero, k));
}

template <bool kKeepNonzero>
COAT_SIMD_INLINE I encode_unsigned(const uint32_t* entry, F x, F absmax) {
  if (!kKeepNonzero) return nearest_magnitude(entry, max(div(x, absmax), set1(0.0f)));
  const I k = nearest_magnitude(entry, div(x, absmax));
  return zero_where(no_bits(as_int(x), set1(-1)), umax(k, set1(1)));
}

enum class MapUse { kSigned, kUnsigned, kSecondMoment };  // of the last no non-zero value takes code 0, and none is negative

// Codes of n finite values, a multiple of kBlockStride, whose largest magnitude is absmax.
template <MapUse use>
static inline void encode_finite(const uint32_t* entry, const float* x, int n, float absmax, uint8_t* codes) {
  if (absmax == 0) {
    memset(codes, use == MapUse::kSigned ? kDynamic8Zero : 0, static_cast<size_t>(n));
    return;
  }
  const F top = set1(absmax);
  const auto code_of = [&](int i) __attribute__((always_inline)) {
    const F value = load(x + i);
    return use == MapUse::kSigned ? encode_signed(entry, value, top) : encode_unsigned<use == MapUse::kSecondMoment>(entry, value, top);
  };
  for (int i = 0; i < n; i += 4 * kLanes) {
    store_u8(codes + i, code_of(i), code_of(i + kLanes), code_of(i + 2 * kLanes), code_of(i + 3 * kLanes));
  }
}

COAT_SIMD_INLINE uint32_t largest(I max_bits) {
  uint32_t out[4];
  reduce(max_bits, max_bits, max_bits, max_bits, out);
  return out[0];
}

// Pattern of the largest magnitude of n values; NaN and infinities count.
static inline uint32_t largest_bits(const float* x, int n) {
  I max_bits = set1(0);
  for (int i = 0; i < n; i += kLanes) max_bits = umax(max_bits, as_int(abs(load(x + i))));
  return largest(max_bits);
}

// Encodes n values, a multiple of kBlockStride, whose largest pattern is max_bits. Non-finite ones become 0 in x. Returns absmax.
template <MapUse use>
static inline float encode_block(const uint32_t* entry, float* x, int n, uint32_t max_bits, uint8_t* codes) {
  if (max_bits >= kInfBits) {
    for (int i = 0; i < n; ++i) x[i] = is_finite(x[i]) ? x[i] : 0.0f;
    max_bits = largest_bits(x, n);
  }
  const float absmax = bits_float(max_bits);
  encode_finite<use>(entry, x, n, absmax, codes);
  return absmax;
}

}  // namespace coat::COAT_ISA
