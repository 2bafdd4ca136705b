// The scaled 8-bit formats: rows of float32 to codes and scales, and back.
//
// Arithmetic alone, no tables: rounding to an FP8 code is the addition of a float whose last bit is the code's step.
#pragma once

#include "../formats/scaled8.h"
#include "simd.h"

namespace coat::COAT_ISA {

// Pattern of the largest magnitude of n floats (a multiple of kLanes), at least kInfBits if one is not finite.
COAT_SIMD_INLINE uint32_t largest_bits(const float* x, int n) {
  I top = as_int(abs(load(x)));
  for (int i = kLanes; i < n; i += kLanes) top = umax(top, as_int(abs(load(x + i))));
  return reduce_max(top);
}

// The same of finite elements alone.
static inline uint32_t largest_finite_bits(const float* x, int n) {
  uint32_t top = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = float_bits(x[i]) & kAbsMask;
    if (bits < kInfBits && bits > top) top = bits;
  }
  return top;
}

// Codes without sign of |p| up to one unit of float32 above the format's maximum.
template <int kMantissa, int kBias>
COAT_SIMD_INLINE I round_to_float8(F p) {
  constexpr int kShift = 23 - kMantissa, kLowest = 128 - kBias;
  const I exponent = umax(and_(as_int(p), set1(0x7F800000)), set1(kLowest << 23));
  const I unit = add(exponent, set1(kShift << 23));
  const I steps = sub(as_int(add(abs(p), as_float(unit))), unit);
  return add(steps, sub(shr<kShift>(exponent), set1(kLowest << kMantissa)));
}

template <int kMantissa, int kBias>
COAT_SIMD_INLINE void encode_float8(const float* x, int n, F inverse, uint8_t* codes) {
  store_codes(codes, n, [&](int i) __attribute__((always_inline)) {
    const F p = mul(load(x + i), inverse);
    const I code = round_to_float8<kMantissa, kBias>(p);
    return zero_where(no_bits(code, set1(0x7F)), insert_sign(code, p));
  });
}

// Adding it leaves a small signed integer, rounded to even, in the low byte of the pattern.
constexpr float kInt8Magic = 12582912.0f;  // 1.5 * 2^23

// Returns the sum of the squared codes, exact: at most 256 of them.
COAT_SIMD_INLINE int encode_int8(const float* x, int n, F inverse, uint8_t* codes) {
  const F magic = set1(kInt8Magic);
  F squares = set1(0.0f);
  store_codes(codes, n, [&](int i) __attribute__((always_inline)) {
    const F shifted = add(mul(load(x + i), inverse), magic), code = sub(shifted, magic);
    squares = fma(code, code, squares);
    return and_(as_int(shifted), set1(0xFF));
  });
  alignas(64) float lanes[kLanes];
  store(lanes, squares);
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return static_cast<int>(sum);
}

// Codes of n floats (a multiple of kLanes) of magnitudes up to amax; fmt is not kAuto.
COAT_SIMD_INLINE void encode_under(int fmt, const float* x, int n, float amax, uint8_t* codes) {
  const F inverse = set1(scaled_max(fmt) / amax);
  if (is_int8(fmt)) {
    encode_int8(x, n, inverse, codes);
  } else if (fmt == static_cast<int>(ScaledFormat::kE4M3)) {
    encode_float8<3, 7>(x, n, inverse, codes);
  } else {
    encode_float8<2, 15>(x, n, inverse, codes);
  }
}

// Codes of n finite floats (a multiple of kLanes) of magnitudes up to amax, of which `count` are real; returns the scale.
COAT_SIMD_INLINE float encode_finite(int fmt, const float* x, int n, int count, float amax, uint8_t* codes) {
  if (fmt == static_cast<int>(ScaledFormat::kAuto)) {
    constexpr int kInt8 = static_cast<int>(ScaledFormat::kInt8);
    const int squares = encode_int8(x, n, set1(scaled_max(kInt8) / amax), codes);
    if (auto_takes_int8(squares, count)) return -(amax / scaled_max(kInt8));
    fmt = static_cast<int>(ScaledFormat::kE4M3);
  }
  encode_under(fmt, x, n, amax, codes);
  return amax / scaled_max(fmt);
}

COAT_SIMD_INLINE float floored_amax(uint32_t bits) { return bits_float(bits > kMinAmaxBits ? bits : kMinAmaxBits); }

// A group with NaN or infinite elements: they count as zeros and take the code of NaN.
static inline float encode_odd(int fmt, const float* x, int n, int count, uint8_t* codes) {
  alignas(64) float finite[kMaxRowGroup] = {};
  for (int i = 0; i < n; ++i) finite[i] = is_finite(x[i]) ? x[i] : 0.0f;
  const float scale = encode_finite(fmt, finite, n, count, floored_amax(largest_bits(finite, n)), codes);
  const uint8_t nan_code = scale < 0 ? kInt8NanCode : scaled_nan_code(fmt);
  for (int i = 0; i < n; ++i) {
    if (!is_finite(x[i])) codes[i] = nan_code;
  }
  return scale;
}

// One group of n floats (a multiple of kLanes), of which `count` are real; returns the scale.
COAT_SIMD_INLINE float encode_group8(int fmt, const float* x, int n, int count, uint8_t* codes) {
  const uint32_t top = largest_bits(x, n);
  return top < kInfBits ? encode_finite(fmt, x, n, count, floored_amax(top), codes) : encode_odd(fmt, x, n, count, codes);
}

// The codes and scales of n floats that start at a group's border. Reads and writes nothing beyond them.
static inline void encode_row(const Scaled8& format, const float* x, int64_t n, uint8_t* codes, float* scale) {
  const int size = format.group_size;
  int64_t first = 0;
  for (; first + size <= n; first += size) *scale++ = encode_group8(format.fmt, x + first, size, size, codes + first);
  if (first == n) return;
  alignas(64) float padded[kMaxRowGroup] = {};
  alignas(64) uint8_t padded_codes[kMaxRowGroup];
  const int count = static_cast<int>(n - first);
  memcpy(padded, x + first, static_cast<size_t>(count) * sizeof(float));
  *scale = encode_group8(format.fmt, padded, size, count, padded_codes);
  memcpy(codes + first, padded_codes, static_cast<size_t>(count));
}

// Values of n codes (a multiple of kLanes) under one scale of any sign.
COAT_SIMD_INLINE void decode_group8(int fmt, const uint8_t* codes, int n, float scale, float* x) {
  if (fmt == static_cast<int>(ScaledFormat::kAuto)) {
    fmt = static_cast<int>(scale < 0 ? ScaledFormat::kInt8 : ScaledFormat::kE4M3);
    scale = scale < 0 ? -scale : scale;
  }
  if (is_int8(fmt)) {
    const F factor = set1(scale);
    const I nan_code = set1(-128), nan = set1(static_cast<int32_t>(kNanBits));
    for (int i = 0; i < n; i += kLanes) {
      const I code = load_i8(codes + i);
      store(x + i, as_float(select(less(nan_code, code), as_int(mul(to_float(code), factor)), nan)));
    }
  } else if (fmt == static_cast<int>(ScaledFormat::kE4M3)) {
    const F factor = set1(scale * 256);  // load_e4m3 reads 2^-8 of the value; exact
    for (int i = 0; i < n; i += kLanes) store(x + i, mul(load_e4m3(codes + i), factor));
  } else {
    const F factor = set1(scale);
    for (int i = 0; i < n; i += kLanes) store(x + i, mul(load_e5m2(codes + i), factor));
  }
}

// The values of n codes that start at a group's border. Reads and writes nothing beyond them.
static inline void decode_row(const Scaled8& format, const uint8_t* codes, const float* scale, int64_t n, float* x) {
  const int size = format.group_size;
  int64_t first = 0;
  for (; first + size <= n; first += size) decode_group8(format.fmt, codes + first, size, *scale++, x + first);
  if (first == n) return;
  alignas(64) uint8_t padded_codes[kMaxRowGroup] = {};
  alignas(64) float padded[kMaxRowGroup];
  const auto count = static_cast<size_t>(n - first);
  memcpy(padded_codes, codes + first, count);
  decode_group8(format.fmt, padded_codes, size, *scale, padded);
  memcpy(x + first, padded, count * sizeof(float));
}

}  // namespace coat::COAT_ISA
