// The blockwise dynamic 8-bit map: tables at compile time, and the encode of one value. The C++ twin of formats/dynamic8.py;
// coat_kernels/formats/README.md, "Blockwise dynamic map", gives it its meaning.
#pragma once

#include "codecs.h"

#ifdef __CUDACC__
#define COAT_CONSTEXPR static constexpr __host__ __device__
#else
#define COAT_CONSTEXPR static constexpr
#endif

namespace coat {

constexpr int kDynamic8Decades = 7;
constexpr int kDynamic8Zero = 127;  // signed code of 0.0; the unsigned one is 0
// Upper 16 bits of the pattern of |z|: the first that the encode table has, under every threshold, and how many up to 1.0.
constexpr int kDynamic8Base = 0x342D, kDynamic8Size = 0x3F80 - kDynamic8Base + 1;

// Number of magnitudes of a map, 0 and 1 included; a code is its index k (signed: 127 + k or 127 - k).
COAT_CONSTEXPR int dynamic8_count(bool is_signed) { return is_signed ? 129 : 256; }

// Magnitude k, in units of absmax. Every operation rounds to float32; borders of parts round once, from exact double.
COAT_CONSTEXPR float dynamic8_magnitude(bool is_signed, int k) {
  if (k == 0) return 0.0f;
  if (k == dynamic8_count(is_signed) - 1) return 1.0f;
  constexpr float kPower[kDynamic8Decades] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  const int shift = is_signed ? 0 : 1;  // decade i has 2^(i + shift) parts, the first with k = 2^(i + shift) - shift
  int decade = 0;
  while (k + shift >= 2 << (decade + shift)) ++decade;
  const int parts = 1 << (decade + shift), index = k + shift - parts;
  const double step = (1.0f - 0.1f) / static_cast<float>(parts);
  float borders[2] = {};
  for (int side = 0; side < 2; ++side) {
    const int j = index + side;
    borders[side] = static_cast<float>(j < (parts + 1) / 2 ? static_cast<double>(0.1f) + step * j : 1.0 - step * (parts - j));
  }
  return (borders[0] + borders[1]) / 2.0f * kPower[decade];
}

// Pattern of the smallest float32 above x, a normal number (equal to x if `or_equal` and x is a float32).
COAT_CONSTEXPR uint32_t dynamic8_pattern(double x, bool or_equal) {
  int exponent = 0;
  while (x < 1) {
    x *= 2;
    --exponent;
  }
  const double units = (x - 1) * 8388608.0;
  const auto whole = static_cast<uint32_t>(units);
  const bool up = static_cast<double>(whole) < units || !or_equal;
  return (static_cast<uint32_t>(exponent + 127) << 23) + whole + (up ? 1 : 0);
}

// Pattern of the smallest |z| that takes magnitude k + 1: halfway goes to the even code.
COAT_CONSTEXPR uint32_t dynamic8_threshold(bool is_signed, int k) {
  const double middle =
      (static_cast<double>(dynamic8_magnitude(is_signed, k)) + static_cast<double>(dynamic8_magnitude(is_signed, k + 1))) / 2;
  return dynamic8_pattern(middle, (k + 1 + (is_signed ? kDynamic8Zero : 0)) % 2 == 0);
}

// map: by code. entry: by the upper 16 bits of |z|'s pattern less kDynamic8Base; the lower 16 carry into k at a threshold.
struct Dynamic8Tables {
  float map[256];
  uint32_t entry[kDynamic8Size];
};

COAT_CONSTEXPR Dynamic8Tables make_dynamic8_tables(bool is_signed) {
  Dynamic8Tables tables{};
  for (int code = 0; code < 256; ++code) {
    const int k = is_signed ? code - kDynamic8Zero : code;
    tables.map[code] = k < 0 ? -dynamic8_magnitude(is_signed, -k) : dynamic8_magnitude(is_signed, k);
  }
  const int last = dynamic8_count(is_signed) - 1;
  int k = 0;
  uint32_t threshold = dynamic8_threshold(is_signed, 0);
  for (int i = 0; i < kDynamic8Size; ++i) {
    const uint32_t bucket = static_cast<uint32_t>(kDynamic8Base + i);
    tables.entry[i] = static_cast<uint32_t>(k) << 16;
    if (k == last || threshold >> 16 != bucket) continue;
    tables.entry[i] += 0x10000u - (threshold & 0xFFFF);
    if (++k < last) threshold = dynamic8_threshold(is_signed, k);
  }
  return tables;
}

// Index of the magnitude nearest to |z| <= 1.
COAT_INLINE int dynamic8_index(const uint32_t* entry, float z) {
  const uint32_t bits = float_bits(z) & kAbsMask;
  const int bucket = clamp_int(static_cast<int>(bits >> 16) - kDynamic8Base, 0, kDynamic8Size - 1);
  return static_cast<int>(((bits & 0xFFFF) + entry[bucket]) >> 16);
}

// The code of z = x / absmax in [-1, 1]; `entry` of the signed map.
COAT_INLINE uint8_t dynamic8_encode_signed(const uint32_t* entry, float z) {
  const int k = dynamic8_index(entry, z);
  return static_cast<uint8_t>(z < 0 ? kDynamic8Zero - (k < kDynamic8Zero ? k : kDynamic8Zero) : kDynamic8Zero + k);
}

// The code of z = x / absmax <= 1; `entry` of the unsigned map. Negative z takes 0. keep_nonzero: z > 0 takes 1 at least; where
// x / absmax may underflow to 0 the caller looks at x.
COAT_INLINE uint8_t dynamic8_encode_unsigned(const uint32_t* entry, float z, bool keep_nonzero) {
  const int k = z > 0 ? dynamic8_index(entry, z) : 0;
  return static_cast<uint8_t>(keep_nonzero && z > 0 && k == 0 ? 1 : k);
}

}  // namespace coat
