// The stored states of the CAME step, a run of elements at a time; ops/came_8bit/reference.py has their formats.
#pragma once

#include "../formats/random.h"
#include "came_work.h"
#include "log2.h"

namespace coat::COAT_ISA {

constexpr float kHistoryUnits = 7225.0f;  // edge_history code c is c^2 / 7225: 9 at c = 255

// 255 less the random byte r of each of the elements first .. first + n - 1: what `by_chance` adds. `out` has room for n + 8 + 4 * kLanes;
// returns that of the first element.
static inline const uint8_t* random_bytes(uint32_t key, int64_t first, int n, uint8_t* out) {
  const auto word = static_cast<uint32_t>(first >> 2);
  const int offset = static_cast<int>(first & 3), words = (offset + n + 3) >> 2;
  const I golden = set1(static_cast<int32_t>(kGolden)), mix1 = set1(static_cast<int32_t>(kMix1)), mix2 = set1(static_cast<int32_t>(kMix2));
  I at = add(set1(static_cast<int32_t>(key)), mul(add(set1(static_cast<int32_t>(word)), iota()), golden));
  const I step = set1(static_cast<int32_t>(kGolden * kLanes)), ones = set1(-1);
  for (int i = 0; i < words; i += kLanes) {
    I h = xor_(at, shr<16>(at));
    h = mul(h, mix1);
    h = mul(xor_(h, shr<13>(h)), mix2);
    store(reinterpret_cast<uint32_t*>(out + 4 * i), xor_(xor_(h, shr<16>(h)), ones));
    at = add(at, step);
  }
  return out + offset;
}

// The random bytes of a tile, in its own layout. Both buffers have room for a tile and 8 + 4 * kLanes bytes.
static inline const uint8_t* tile_random_bytes(const Work& w, const Tile& tile, uint32_t key, uint8_t* out, uint8_t* spare) {
  if (tile.dense()) return random_bytes(key, in_tensor(w, tile), tile.count(), out);
  for (int r = 0; r < tile.rows; ++r) {
    const uint8_t* const bytes = random_bytes(key, in_tensor(w, row_of(tile, r)), tile.cols, spare);
    memcpy(out + r * tile.width, bytes, static_cast<size_t>(tile.cols));
  }
  return out;
}

// below + 1 where u < odds, u = (r + 1/2) / 256, else below; `odds` in units of 1/256. The carry of 255 - r is the comparison.
COAT_SIMD_INLINE I by_chance(I below, F odds, const uint8_t* random) {
  return shr<8>(add(add(shl<8>(below), nearest(odds)), load_u8(random)));
}

struct MaskDecoder {
  Table16 hi, lo;
};

COAT_SIMD_INLINE MaskDecoder mask_decoder(const CameMask& mask) { return {load16(mask.hi), load16(mask.lo)}; }

COAT_SIMD_INLINE F decode_mask(const MaskDecoder& tables, const uint8_t* codes) {
  const I code = load_u8(codes), low = set1(15);
  return mul(as_float(lookup(tables.hi, shr<4>(code))), as_float(lookup(tables.lo, and_(code, low))));
}

// Copies of what CameMask says: bytes that are stored may alias it, and it would be read again for each vector.
struct MaskEncoder {
  F position[kFastDegree + 1], per_octave, odds[2];
};

COAT_SIMD_INLINE MaskEncoder mask_encoder(const CameMask& mask) {
  MaskEncoder encoder;
  encoder.per_octave = set1(mask.per_octave);
  for (int d = 0; d <= kFastDegree; ++d) encoder.position[d] = set1(kFastLog2[d] * mask.per_octave + (d == 0 ? mask.of_unit : 0.0f));
  for (int d = 0; d < 2; ++d) encoder.odds[d] = set1(mask.odds[d]);
  return encoder;
}

// The code of values in [min_lr, max_lr]. An error of the position at a code's border is an equal error of odds near 0 or 1.
COAT_SIMD_INLINE I encode_mask(const MaskEncoder& mask, F values, const uint8_t* random) {
  F exponent, m;
  split_normal(values, &exponent, &m);
  F position = mask.position[kFastDegree];
  for (int d = kFastDegree - 1; d >= 0; --d) position = fma(position, m, mask.position[d]);
  position = fma(exponent, mask.per_octave, position);
  const I below = truncate(position);
  const F f = sub(position, to_float(below));
  return by_chance(below, mul(f, fma(mask.odds[1], f, mask.odds[0])), random);
}

// The code of a history x in units of 1 / kHistoryUnits, in which a code's value is its square. Where the root's error gives the
// next code, the odds are that much under 0 or over 1.
COAT_SIMD_INLINE I encode_history(F x, const uint8_t* random) {
  x = min(max(x, set1(1e-6f)), set1(65024.9f));  // NaN: 0
  const I below = truncate(near_sqrt(x));
  const F c = to_float(below);
  return by_chance(below, mul(fnma(c, c, x), near_reciprocal(fma(c, set1(2.0f / 256), set1(1.0f / 256)))), random);
}

// Bits first .. first + n - 1 of a packed array, n <= kLanes.
static uint32_t load_few_bits(const uint8_t* packed, int64_t first, int n) {
  const uint8_t* const from = packed + (first >> 3);
  const int shift = static_cast<int>(first & 7), bytes = (shift + n + 7) >> 3;
  uint32_t bits = 0;
  for (int i = 0; i < bytes; ++i) bits |= static_cast<uint32_t>(from[i]) << (8 * i);
  return bits >> shift;
}

static void store_few_bits(uint8_t* packed, int64_t first, int n, uint32_t bits) {
  uint8_t* const to = packed + (first >> 3);
  const int shift = static_cast<int>(first & 7), bytes = (shift + n + 7) >> 3;
  const uint32_t mask = ((1u << n) - 1) << shift, shifted = bits << shift;
  for (int i = 0; i < bytes; ++i) {
    const uint32_t byte_mask = (mask >> (8 * i)) & 0xFF;
    to[i] = static_cast<uint8_t>((to[i] & ~byte_mask) | ((shifted >> (8 * i)) & byte_mask));
  }
}

// Exchanges kLanes bits, or the n < kLanes that are left of a row, for new ones. Returns the old.
COAT_SIMD_INLINE uint32_t exchange_bits(uint8_t* packed, int64_t first, int n, uint32_t bits) {
  if (kLanes % 8 == 0 && n >= kLanes && first % 8 == 0) {
    uint32_t old = 0;
    memcpy(&old, packed + (first >> 3), kLanes / 8);
    memcpy(packed + (first >> 3), &bits, kLanes / 8);
    return old;
  }
  if (n > kLanes) n = kLanes;
  const uint32_t old = load_few_bits(packed, first, n);
  store_few_bits(packed, first, n, bits);
  return old;
}

}  // namespace coat::COAT_ISA
