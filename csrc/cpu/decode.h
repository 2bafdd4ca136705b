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

// Whether a Decoder is exact enough: no NaN codes, no product outside float32's normal range.
static inline bool tables_serve(const GroupFormat& format, const uint8_t* codes, float amax, uint8_t meta) {
  if (amax != 0 && amax < format.decode[meta].exact_below) return false;
  return !is_fp8(format.codec) || !any_above(codes, format.group_size, format.max_code);
}

static inline void decode_exactly(const GroupFormat& format, const uint8_t* codes, float amax, uint8_t meta, float* out) {
  for (int i = 0; i < format.group_size; ++i) out[i] = decode_exact(format.codec, amax, meta, codes[i]);
}

static inline void decode_group(const GroupFormat& format, const uint8_t* codes, float amax, uint8_t meta, float* out) {
  if (!tables_serve(format, codes, amax, meta)) return decode_exactly(format, codes, amax, meta, out);
  const Decoder decoder = make_decoder(format.decode[meta], format.low_mask, amax, 1.0f);
  for (int i = 0; i < format.group_size; i += kLanes) store(out + i, decode(decoder, codes + i));
}

}  // namespace coat::COAT_ISA
