// Codes to float32.
#pragma once

#include "simd.h"

namespace coat::COAT_ISA {

// One group's decoder. factor folds into the values: beta1 or beta2 in a step.
struct Decoder {
  Table16 hi, lo, low;
  I low_mask;
};

COAT_SIMD_INLINE Decoder make_decoder(const DecodeTable& table, int low_mask, float amax, float factor) {
  return {scale(load16(table.hi), set1(amax * factor)), load16(table.lo), load16(table.low), set1(low_mask)};
}

COAT_SIMD_INLINE F decode(const Decoder& decoder, const uint8_t* codes) {
  const I code = load_u8(codes);
  const I hi = lookup(decoder.hi, shr<4>(code));
  const I lo = lookup_where(no_bits(code, decoder.low_mask), decoder.low, code, lookup(decoder.lo, code));
  return mul(as_float(hi), as_float(lo));
}

// Whether a product of the tables may leave float32's normal range.
COAT_SIMD_INLINE bool out_of_range(const GroupFormat& format, float amax, uint8_t meta) {
  return amax != 0 && amax < format.decode[meta].exact_below;
}

COAT_SIMD_INLINE bool has_nan(const GroupFormat& format, const uint8_t* codes) {
  return is_fp8(format.codec) && any_above(codes, format.group_size, format.max_code);
}

// A group's values times factor, to the same bit as make_decoder's.
static inline void decode_group(const GroupFormat& format, const uint8_t* codes, float amax, uint8_t meta, float factor, float* out) {
  const int n = format.group_size;
  if (out_of_range(format, amax, meta)) {
    for (int i = 0; i < n; ++i) out[i] = decode_exact(format.codec, amax, meta, codes[i]) * factor;
    return;
  }
  const Decoder decoder = make_decoder(format.decode[meta], format.low_mask, amax, factor);
  for (int i = 0; i < n; i += kLanes) store(out + i, decode(decoder, codes + i));
  if (!has_nan(format, codes)) return;
  for (int i = 0; i < n; ++i) {
    if ((codes[i] & 0x7F) > format.max_code) out[i] = bits_float(kNanBits);
  }
}

}  // namespace coat::COAT_ISA
