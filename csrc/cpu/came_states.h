// The stored states of the CAME step, a run of elements at a time; ops/came_8bit/reference.py has their formats.
#pragma once

#include "../formats/random.h"
#include "came_work.h"
#include "log2.h"

namespace coat::COAT_ISA {

constexpr float kHistoryUnits = 7225.0f;  // edge_history code c is c^2 / 7225: 9 at c = 255

// The random bytes of elements first .. first + n - 1. `out` has room for n + 8 + 4 * kLanes; returns that of the first element.
static inline const uint8_t* random_bytes(uint32_t key, int64_t first, int n, uint8_t* out) {
  const auto word = static_cast<uint32_t>(first >> 2);
  const int offset = static_cast<int>(first & 3), words = (offset + n + 3) >> 2;
  const I golden = set1(static_cast<int32_t>(kGolden)), mix1 = set1(static_cast<int32_t>(kMix1)), mix2 = set1(static_cast<int32_t>(kMix2));
  I at = add(set1(static_cast<int32_t>(key)), mul(add(set1(static_cast<int32_t>(word)), iota()), golden));
  const I step = set1(static_cast<int32_t>(kGolden * kLanes));
  for (int i = 0; i < words; i += kLanes) {
    I h = xor_(at, shr<16>(at));
    h = mul(h, mix1);
    h = mul(xor_(h, shr<13>(h)), mix2);
    store(reinterpret_cast<uint32_t*>(out + 4 * i), xor_(h, shr<16>(h)));
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

COAT_SIMD_INLINE F uniform(const uint8_t* random) {  // in (0, 1)
  return mul(add(to_float(load_u8(random)), set1(0.5f)), set1(1.0f / 256));
}

// code + 1 with probability `odds`
COAT_SIMD_INLINE I by_chance(I code, F odds, const uint8_t* random) {
  return add(code, select(less(uniform(random), odds), set1(1), set1(0)));
}

static inline void decode_table(const float* table, const uint8_t* codes, int n, float* out) {
  for (int i = 0; i < n; i += kLanes) store(out + i, gather(table, load_u8(codes + i)));
}

// Codes of values > 0 by the logarithm; an error of the fraction at a code's border is one of the odds, near 0 or 1.
static inline void encode_mask(const CameMask& mask, const float* values, int n, const uint8_t* random, uint8_t* codes) {
  const F inv_start = set1(mask.inv_start), inv_octaves = set1(mask.inv_octaves);
  for (int i = 0; i < n; i += kLanes) {
    F exponent, m;
    split_normal(mul(load(values + i), inv_start), &exponent, &m);
    m = sub(m, set1(1.0f));
    F log2 = set1(kCarefulLog2[kCarefulDegree]);
    for (int d = kCarefulDegree - 1; d >= 0; --d) log2 = fma(log2, m, set1(kCarefulLog2[d]));
    const F position = clamp(set1(0.0f), set1(255.0f), fma(add(exponent, log2), inv_octaves, set1(128.0f)));
    const I below = truncate(min(position, set1(254.0f)));
    const F f = sub(position, to_float(below));
    F odds = set1(mask.odds[5]);
    for (int d = 4; d >= 1; --d) odds = fma(odds, f, set1(mask.odds[d]));
    store_u8(codes + i, by_chance(below, mul(odds, f), random + i));
  }
}

static inline void decode_history(const uint8_t* codes, int n, float* out) {
  for (int i = 0; i < n; i += kLanes) {
    const F c = to_float(load_u8(codes + i));
    store(out + i, mul(mul(c, c), set1(1.0f / kHistoryUnits)));
  }
}

static inline void encode_history(const float* values, int n, const uint8_t* random, uint8_t* codes) {
  for (int i = 0; i < n; i += kLanes) {
    const F square = mul(max(load(values + i), set1(0.0f)), set1(kHistoryUnits));  // NaN: 0
    const I below = truncate(min(sqrt(square), set1(254.0f)));
    const F c = to_float(below);
    const F odds = div(sub(square, mul(c, c)), add(add(c, c), set1(1.0f)));
    store_u8(codes + i, by_chance(below, odds, random + i));
  }
}

static inline void decode_torque(const int8_t* codes, int n, float* out) {
  for (int i = 0; i < n; i += kLanes) store(out + i, mul(to_float(load_i8(codes + i)), set1(1.0f / 127)));
}

static inline void encode_torque(const float* values, int n, int8_t* codes) {
  for (int i = 0; i < n; i += kLanes) {
    const F x = load(values + i);
    const M no_sign = same(less(x, set1(0.0f)), less(set1(0.0f), x));  // 0 or NaN
    const F scaled = choose(no_sign, set1(0.0f), mul(x, set1(127.0f)));
    const I code = nearest(clamp(set1(-127.0f), set1(127.0f), scaled));
    store_u8(reinterpret_cast<uint8_t*>(codes + i), and_(code, set1(0xFF)));
  }
}

// Bits first .. first + n - 1 of a packed array, n <= kLanes.
COAT_SIMD_INLINE uint32_t load_bits(const uint8_t* packed, int64_t first, int n) {
  const uint8_t* const from = packed + (first >> 3);
  const int shift = static_cast<int>(first & 7), bytes = (shift + n + 7) >> 3;
  uint32_t bits = from[0];
  if (bytes > 1) bits |= static_cast<uint32_t>(from[1]) << 8;
  if (bytes > 2) bits |= static_cast<uint32_t>(from[2]) << 16;
  return bits >> shift;
}

COAT_SIMD_INLINE void store_bits(uint8_t* packed, int64_t first, int n, uint32_t bits) {
  uint8_t* const to = packed + (first >> 3);
  const int shift = static_cast<int>(first & 7), bytes = (shift + n + 7) >> 3;
  const uint32_t mask = ((1u << n) - 1) << shift, shifted = bits << shift;
  for (int i = 0; i < bytes; ++i) {
    const uint32_t byte_mask = (mask >> (8 * i)) & 0xFF;
    to[i] = static_cast<uint8_t>((to[i] & ~byte_mask) | ((shifted >> (8 * i)) & byte_mask));
  }
}

}  // namespace coat::COAT_ISA
