// How float32 values are stored in 16-bit dtypes: README.md, "Stochastic rounding" and "24-bit parameters".
#pragma once

#include "codecs.h"

namespace coat {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class ParamRounding : int { kNearest = 0, kStochastic = 1, kSplit = 2 };

constexpr uint32_t kBFloat16MaxBits = 0x7F7F0000u;  // the largest finite bfloat16 as a float32

COAT_INLINE int dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

COAT_INLINE float from_bfloat16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

COAT_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & kAbsMask) > kInfBits) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

COAT_INLINE float from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7FFF;
  if (magnitude >= 0x7C00) return bits_float(sign | kInfBits | (magnitude & 0x3FF) << 13);
  if (magnitude >= 0x0400) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  return bits_float(sign | float_bits(static_cast<float>(magnitude) * 5.9604644775390625e-08f));  // 2^-24
}

COAT_INLINE uint16_t to_float16(float x) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & kAbsMask;
  uint32_t h;
  if (magnitude > kInfBits) {
    h = 0x7E00;
  } else if (magnitude >= 0x477FF000u) {  // 65520, half a unit above the largest float16
    h = 0x7C00;
  } else if (magnitude < 0x38800000u) {  // under 2^-14 the unit is 2^-24, that of float32 in [0.5, 1)
    h = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    h = (magnitude - (112u << 23) + 0x0FFF + ((magnitude >> 13) & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | h);
}

COAT_INLINE float from_dtype(uint16_t h, DType dtype) { return dtype == DType::kBFloat16 ? from_bfloat16(h) : from_float16(h); }
COAT_INLINE uint16_t to_dtype(float x, DType dtype) { return dtype == DType::kBFloat16 ? to_bfloat16(x) : to_float16(x); }

// x rounded up or down with odds that keep its expectation. random: 16 bits. Non-finite x is stored as is.
COAT_INLINE uint16_t to_dtype_stochastic(float x, DType dtype, uint32_t random) {
  if (!is_finite(x)) return to_dtype(x, dtype);
  const uint32_t bits = float_bits(x);
  if (dtype == DType::kBFloat16) return static_cast<uint16_t>((bits + random) >> 16);
  const int exponent = static_cast<int>((bits >> 23) & 0xFF) - 127, unit = (exponent < -14 ? -14 : exponent) - 10;
  const float ulp = bits_float(static_cast<uint32_t>(127 + unit) << 23), inverse = bits_float(static_cast<uint32_t>(127 - unit) << 23);
  const float steps = bits_float(bits & kAbsMask) * inverse + static_cast<float>(random >> 3) / 8192.0f;
  const float magnitude = static_cast<float>(static_cast<int>(steps)) * ulp;
  return static_cast<uint16_t>(to_float16(magnitude) | (bits >> 16 & 0x8000));
}

// A float32 as a bfloat16 pattern and an int8 residual: 24 of its bits.
COAT_INLINE uint16_t split_encode(float x, int8_t* residual) {
  const uint32_t bits = float_bits(x);
  if ((bits & kAbsMask) > kInfBits) {
    *residual = 0;
    return 0x7FC0;
  }
  // In 64 bits: rounding the pattern of the largest negative values up carries out of 32.
  const uint64_t top24 = (static_cast<uint64_t>(bits) + 0x80) >> 8;
  const uint64_t high = (top24 + 0x80) >> 8;
  *residual = static_cast<int8_t>(static_cast<int64_t>(top24) - static_cast<int64_t>(high << 8));
  return static_cast<uint16_t>(high);
}

COAT_INLINE float split_decode(uint16_t param, int8_t residual) {
  const uint32_t top24 = (static_cast<uint32_t>(param) << 8) + static_cast<uint32_t>(static_cast<int32_t>(residual));
  return bits_float(top24 << 8);
}

}  // namespace coat
