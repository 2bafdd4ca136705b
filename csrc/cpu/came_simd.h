// What the CAME step needs of vectors beyond simd.h.
#pragma once

#include "simd.h"

namespace coat::COAT_ISA {

#if defined(COAT_ISA_AVX512)
COAT_SIMD_INLINE uint32_t bits_of(M m) { return m; }
COAT_SIMD_INLINE M mask_of(uint32_t bits) { return static_cast<M>(bits); }
COAT_SIMD_INLINE M same(M a, M b) { return static_cast<M>(~(a ^ b)); }
COAT_SIMD_INLINE F choose(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
COAT_SIMD_INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
#elif defined(COAT_ISA_AVX2)
COAT_SIMD_INLINE uint32_t bits_of(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(as_float(m.bits))); }
COAT_SIMD_INLINE M mask_of(uint32_t bits) {
  const I lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return {_mm256_cmpeq_epi32(and_(set1(static_cast<int32_t>(bits)), lane), lane)};
}
COAT_SIMD_INLINE M same(M a, M b) { return {_mm256_cmpeq_epi32(a.bits, b.bits)}; }
COAT_SIMD_INLINE F choose(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, as_float(m.bits)); }
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
#endif

// |x| < 2^22 to the nearest integer, ties to even.
COAT_SIMD_INLINE I nearest(F x) {
  const F magic = set1(12582912.0f);  // 1.5 * 2^23
  return sub(as_int(add(x, magic)), as_int(magic));
}
COAT_SIMD_INLINE I load_i8(const int8_t* p) { return sub(xor_(load_u8(reinterpret_cast<const uint8_t*>(p)), set1(0x80)), set1(0x80)); }
COAT_SIMD_INLINE F keep_where(M m, F x) { return choose(m, x, set1(0.0f)); }
// The smaller of x and limit; NaN where x is.
COAT_SIMD_INLINE F at_most(F limit, F x) { return min(limit, x); }
COAT_SIMD_INLINE F clamp(F low, F high, F x) { return min(high, max(low, x)); }

}  // namespace coat::COAT_ISA
