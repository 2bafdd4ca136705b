// What the CAME step needs of vectors beyond simd.h.
#pragma once

#include "simd.h"

// A lambda that is not inlined reads what it captures from memory, again after every store.
#define COAT_LAMBDA_INLINE __attribute__((always_inline))

namespace coat::COAT_ISA {

// from_left, from_right: each lane's neighbour, of three vectors in a row.
// nearest: |x| < 2^22 to an integer, ties to even; NaN to one whose low byte is 0. near_sqrt: of x > 0, to 14 bits;
// near_reciprocal to 11. Exact ones of 16 lanes take 16 cycles each.
#if defined(COAT_ISA_AVX512)
COAT_SIMD_INLINE uint32_t bits_of(M m) { return m; }
COAT_SIMD_INLINE M mask_of(uint32_t bits) { return static_cast<M>(bits); }
COAT_SIMD_INLINE M same(M a, M b) { return static_cast<M>(~(a ^ b)); }
COAT_SIMD_INLINE F choose(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
COAT_SIMD_INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
COAT_SIMD_INLINE F from_left(F before, F x) { return as_float(_mm512_alignr_epi32(as_int(x), as_int(before), 15)); }
COAT_SIMD_INLINE F from_right(F x, F after) { return as_float(_mm512_alignr_epi32(as_int(after), as_int(x), 1)); }
COAT_SIMD_INLINE I nearest(F x) { return _mm512_cvtps_epi32(x); }
COAT_SIMD_INLINE F near_reciprocal(F x) { return _mm512_rcp14_ps(x); }
COAT_SIMD_INLINE F near_sqrt(F x) { return mul(x, _mm512_rsqrt14_ps(x)); }
#elif defined(COAT_ISA_AVX2)
COAT_SIMD_INLINE uint32_t bits_of(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(as_float(m.bits))); }
COAT_SIMD_INLINE M mask_of(uint32_t bits) {
  const I lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {_mm256_cmpeq_epi32(and_(set1(static_cast<int32_t>(bits)), lane), lane)};
}
COAT_SIMD_INLINE M same(M a, M b) { return {_mm256_cmpeq_epi32(a.bits, b.bits)}; }
COAT_SIMD_INLINE F choose(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, as_float(m.bits)); }
COAT_SIMD_INLINE I nearest(F x) { return _mm256_cvtps_epi32(x); }
COAT_SIMD_INLINE F from_left(F before, F x) {
  return as_float(_mm256_alignr_epi8(as_int(x), as_int(_mm256_permute2f128_ps(before, x, 0x21)), 12));
}
COAT_SIMD_INLINE F from_right(F x, F after) {
  return as_float(_mm256_alignr_epi8(as_int(_mm256_permute2f128_ps(x, after, 0x21)), as_int(x), 4));
}
COAT_SIMD_INLINE F near_reciprocal(F x) { return _mm256_rcp_ps(x); }
COAT_SIMD_INLINE F near_sqrt(F x) { return sqrt(x); }  // _mm256_rsqrt_ps has 11 bits only
COAT_SIMD_INLINE float sum(F x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
#else
COAT_SIMD_INLINE uint32_t bits_of(M m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
COAT_SIMD_INLINE M mask_of(uint32_t bits) {
  const M lane = {1, 2, 4, 8};
  return ((M{0, 0, 0, 0} + static_cast<int32_t>(bits)) & lane) == lane;
}
COAT_SIMD_INLINE M same(M a, M b) { return a == b; }
COAT_SIMD_INLINE F choose(M m, F yes, F no) { return select(m, yes, no); }
COAT_SIMD_INLINE float sum(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }
COAT_SIMD_INLINE I nearest(F x) {
  const F magic = set1(12582912.0f);  // 1.5 * 2^23
  return truncate(sub(add(x, magic), magic));
}
COAT_SIMD_INLINE F from_left(F before, F x) { return F{before[3], x[0], x[1], x[2]}; }
COAT_SIMD_INLINE F from_right(F x, F after) { return F{x[1], x[2], x[3], after[0]}; }
COAT_SIMD_INLINE F near_reciprocal(F x) { return div(set1(1.0f), x); }
COAT_SIMD_INLINE F near_sqrt(F x) { return sqrt(x); }
#endif

COAT_SIMD_INLINE I load_i8(const int8_t* p) { return sub(xor_(load_u8(reinterpret_cast<const uint8_t*>(p)), set1(0x80)), set1(0x80)); }
COAT_SIMD_INLINE F keep_where(M m, F x) { return choose(m, x, set1(0.0f)); }
// The smaller of x and limit; NaN where x is.
COAT_SIMD_INLINE F at_most(F limit, F x) { return min(limit, x); }
COAT_SIMD_INLINE F clamp(F low, F high, F x) { return min(high, max(low, x)); }

}  // namespace coat::COAT_ISA
