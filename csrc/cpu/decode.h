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

// One group of softsign8: code / (254 - |code|) * amax. factor folds in likewise.
struct SoftsignDecoder {
  F amax;
};

COAT_SIMD_INLINE SoftsignDecoder make_softsign_decoder(float amax, float factor) { return {set1(amax * factor)}; }

COAT_SIMD_INLINE F decode(const SoftsignDecoder& decoder, const uint8_t* codes) {
  const F number = to_float(load_i8(codes));
  return mul(div(number, sub(set1(254.0f), abs(number))), decoder.amax);
}

// Codes of e2m1 (s ee m) to and from bytes of two, the first in the low four bits. Beside the bytes, bit 7 is a code's sign and
// bits 2..0 its magnitude: the layout of FP8, so that both are encoded and decoded alike. Packing an odd count reads one code more.
static inline void pack_codes(const uint8_t* codes, int count, uint8_t* packed) {
  for (int i = 0; i < (count + 1) / 2; ++i) {
    uint16_t pair;
    memcpy(&pair, codes + 2 * i, sizeof pair);
    packed[i] = static_cast<uint8_t>((pair & 7) | (pair >> 4 & 0x78) | (pair >> 8 & 0x80));
  }
}

// Writes an even number of codes.
static inline void unpack_codes(const uint8_t* packed, int count, uint8_t* codes) {
  for (int i = 0; i < (count + 1) / 2; ++i) {
    const int pair = packed[i];
    const auto wide = static_cast<uint16_t>((pair & 7) | (pair & 0x78) << 4 | (pair & 0x80) << 8);
    memcpy(codes + 2 * i, &wide, sizeof wide);
  }
}

// Whether a product of the tables may leave float32's normal range.
COAT_SIMD_INLINE bool out_of_range(const GroupFormat& format, float amax, uint8_t meta) {
  return format.decode != nullptr && amax != 0 && amax < format.decode[meta].exact_below;
}

COAT_SIMD_INLINE bool has_nan(const GroupFormat& format, const uint8_t* codes) {
  return is_fp8(format.codec) && any_above(codes, format.group_size, format.max_code);
}

// A group's values times factor, to the same bit as the decoders'.
static inline void decode_group(const GroupFormat& format, const uint8_t* codes, float amax, uint8_t meta, float factor, float* out) {
  const int n = format.group_size;
  if (out_of_range(format, amax, meta)) {
    for (int i = 0; i < n; ++i) out[i] = decode_exact(format.codec, amax, meta, codes[i]) * factor;
    return;
  }
  if (format.codec == Codec::kSoftsign8) {
    const SoftsignDecoder decoder = make_softsign_decoder(amax, factor);
    for (int i = 0; i < n; i += kLanes) store(out + i, decode(decoder, codes + i));
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
