// Codes of the dynamic map without a lookup in memory: within a decade its thresholds lie on a line. AVX-512 only, where 16 and 32
// table entries are one permute. A gather of 16 values costs 9.5 cycles and hardly anything runs beside it: encoding a vector through
// one takes 15.3 cycles, this 9.8, and an AdamW step is a fifth faster.
#pragma once

#include "blockwise.h"
#include "simd.h"

namespace coat {

// How the map is used. kSecondMoment: none is negative, and no non-zero value takes code 0.
enum class MapUse { kSigned, kUnsigned, kSecondMoment };

constexpr int kLineFraction = 15;
constexpr uint32_t kLineMagic = 0x4B000000;  // 2^23, which holds a fixed-point number in its low bits
// What comes this near a line's integer may lie on the other side of the exact threshold. In units of the fraction: rounding of
// x / absmax, scale, offset and y, and the map's own roundings, add up to 2.9.
constexpr int kLineNear = 8;

// y = scale |z| + offset, in fixed point, counts parts of the decade, so that its integer part is the magnitude's index.
struct alignas(64) Dynamic8Lines {
  uint32_t decade[32];  // by the low bits of z's exponent, 2^-24 to 2^0: (bits + decade) >> 23 is the number of the line
  float scale[16];
  float offset[16];   // with 2^23 and kLineNear in it
  uint32_t last[16];  // largest y, as bits: a decade's last magnitude reaches a little further than its part
};

COAT_CONSTEXPR Dynamic8Lines make_dynamic8_lines(MapUse use) {
  const bool is_signed = use == MapUse::kSigned;
  const int top = dynamic8_count(is_signed) - 1, shift = is_signed ? 0 : 1;
  Dynamic8Lines lines{};
  uint32_t first[kDynamic8Decades + 2] = {};  // pattern of each line's first |z|, raised so that no rounding of z may fall short of it
  const auto line = [&](int number, int first_k, int last_k, double scale, double offset) {
    constexpr double kUnit = 1 << kLineFraction;
    first[number] = number == 0 ? 0 : dynamic8_threshold(is_signed, first_k - 1) + 8;
    lines.scale[number] = static_cast<float>(scale * kUnit);
    lines.offset[number] = static_cast<float>(8388608.0 + kLineNear + offset * kUnit);
    lines.last[number] = kLineMagic + (static_cast<uint32_t>(last_k + 1) << kLineFraction) - 1;
  };
  // 0: from y = 1/2 at z = 0 to 1 at the first threshold, which nothing has to tell where both of its sides take code 1
  const double first_middle = (dynamic8_magnitude(is_signed, 0) + static_cast<double>(dynamic8_magnitude(is_signed, 1))) / 2;
  const bool keep_nonzero = use == MapUse::kSecondMoment;
  line(0, 0, keep_nonzero ? 1 : 0, keep_nonzero ? 0 : 0.5 / first_middle, keep_nonzero ? 1.5 : 0.5);
  double power = 1e6;
  for (int i = 0; i < kDynamic8Decades; ++i) {
    const int parts = 1 << (i + shift), k = parts - shift;
    line(i + 1, k, k + parts - 1, parts * power / 0.9, k - parts / 9.0);
    power /= 10;
  }
  // the last part of the last decade, a quarter further: its threshold to 1 is an integer too
  const int parts = 1 << (kDynamic8Decades - 1 + shift);
  line(kDynamic8Decades + 1, top - 1, top, parts / 0.9, top - parts - parts / 9.0 + 0.25);
  uint32_t number = 0;
  for (uint32_t exponent = 103; exponent <= 127; ++exponent) {  // an octave holds the start of one line at most
    uint32_t entry = (number - exponent) << 23;
    if (number <= kDynamic8Decades && first[number + 1] >> 23 == exponent) {
      entry += 0x800000u - (first[number + 1] & 0x7FFFFF);
      ++number;
    }
    lines.decade[exponent & 31] = entry;
  }
  return lines;
}

#ifdef COAT_ISA_AVX512
namespace avx512 {

constexpr bool kHasLines = true;

template <MapUse use>
struct LineEncoder {
  Table32 decade;
  Table16 scale, offset, last;
  F inverse;  // of absmax

  explicit LineEncoder(float absmax) {
    static constexpr Dynamic8Lines lines = make_dynamic8_lines(use);
    decade = load32(lines.decade);
    scale = load16(lines.scale);
    offset = load16(lines.offset);
    last = load16(lines.last);
    inverse = set1(1.0f / absmax);
  }

  // Whether 1 / absmax, and x times that, are as precise as kLineNear takes them to be.
  static bool can_divide(float absmax) { return absmax > 0x1p-120f && absmax < 0x1p120f; }

  static bool any(const M doubtful[4]) { return (doubtful[0] | doubtful[1] | doubtful[2] | doubtful[3]) != 0; }

  // Codes of a vector, and the lanes that are in doubt.
  COAT_SIMD_MEMBER I encode(F x, M* doubtful) const {
    const F z = _mm512_range_ps(mul(x, inverse), set1(0x1p-24f), 0xB);  // the larger of the magnitudes
    const I number = shr<23>(add(as_int(z), lookup(decade, shr<23>(as_int(z)))));
    const I y = as_int(fma(z, as_float(lookup(scale, number)), as_float(lookup(offset, number))));
    *doubtful = no_bits(y, set1((1 << kLineFraction) - 2 * kLineNear));
    const I k = shr<kLineFraction>(umin(y, lookup(last, number)));  // under the upper bits of 2^23
    constexpr int above = kLineMagic >> kLineFraction;
    if (use != MapUse::kSigned) return _mm512_maskz_sub_epi32(less(set1(0.0f), x), k, set1(above));
    const I forward = add(k, set1(kDynamic8Zero - above));
    return _mm512_mask_sub_epi32(forward, _mm512_movepi32_mask(as_int(x)), set1(kDynamic8Zero + above), k);
  }
};

}  // namespace avx512
#endif

}  // namespace coat
