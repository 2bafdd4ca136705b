// float32 to codes of the dynamic map and back, a block at a time. Codes equal those of formats/dynamic8.h bit for bit.
#pragma once

#include "blockwise.h"
#include "blockwise_lines.h"
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

template <MapUse use>
COAT_SIMD_INLINE I encode(const uint32_t* entry, F x, F absmax) {
  if (use == MapUse::kSecondMoment) {
    const I k = nearest_magnitude(entry, div(x, absmax));
    return zero_where(no_bits(as_int(x), set1(-1)), umax(k, set1(1)));
  }
  constexpr float kLowest = -dynamic8_magnitude(true, kDynamic8Zero);  // -1 has no code: what lies under the lowest entry becomes it
  const F z = max(div(x, absmax), set1(use == MapUse::kSigned ? kLowest : 0.0f));
  const I k = nearest_magnitude(entry, z), zero = set1(kDynamic8Zero);
  return use == MapUse::kUnsigned ? k : select(less(z, set1(0.0f)), sub(zero, k), add(zero, k));
}

#ifndef COAT_ISA_AVX512
constexpr bool kHasLines = false;
template <MapUse use>
struct LineEncoder;
#endif

// Codes of n finite values, a multiple of kBlockStride, whose largest magnitude is absmax.
template <MapUse use>
static inline void encode_finite(const uint32_t* entry, const float* x, int n, float absmax, uint8_t* codes) {
  if (absmax == 0) {
    memset(codes, use == MapUse::kSigned ? kDynamic8Zero : 0, static_cast<size_t>(n));
    return;
  }
  const auto store = [&](int i, auto code_of) __attribute__((always_inline)) {
    store_u8(codes + i, code_of(i), code_of(i + kLanes), code_of(i + 2 * kLanes), code_of(i + 3 * kLanes));
  };
  const F top = set1(absmax);
  const auto exact = [&](int i) __attribute__((always_inline)) { return encode<use>(entry, load(x + i), top); };
  if constexpr (kHasLines) {
    if (LineEncoder<use>::can_divide(absmax)) {
      const LineEncoder<use> lines(absmax);
      for (int i = 0; i < n; i += 4 * kLanes) {
        M doubtful[4];
        store(i, [&](int e) __attribute__((always_inline)) { return lines.encode(load(x + e), doubtful + (e - i) / kLanes); });
        if (__builtin_expect(LineEncoder<use>::any(doubtful), 0)) store(i, exact);
      }
      return;
    }
  }
  for (int i = 0; i < n; i += 4 * kLanes) store(i, exact);
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
