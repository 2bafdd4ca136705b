// AVX-512 F, BW, DQ, VL. Included by simd.h.
#pragma once

#include <immintrin.h>

namespace coat::COAT_ISA {

constexpr int kLanes = 16;
using F = __m512;
using I = __m512i;
using M = __mmask16;

struct Table16 {
  __m512i entries;
};
struct Table32 {
  __m512i first, second;
};

COAT_SIMD_INLINE F set1(float x) { return _mm512_set1_ps(x); }
COAT_SIMD_INLINE I set1(int32_t x) { return _mm512_set1_epi32(x); }
COAT_SIMD_INLINE I iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
COAT_SIMD_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
COAT_SIMD_INLINE I load(const uint32_t* p) { return _mm512_loadu_si512(p); }
COAT_SIMD_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
COAT_SIMD_INLINE void store(uint32_t* p, I x) { _mm512_storeu_si512(p, x); }
COAT_SIMD_INLINE I as_int(F x) { return _mm512_castps_si512(x); }
COAT_SIMD_INLINE F as_float(I x) { return _mm512_castsi512_ps(x); }
COAT_SIMD_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
COAT_SIMD_INLINE I truncate(F x) { return _mm512_cvttps_epi32(x); }

COAT_SIMD_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
COAT_SIMD_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
COAT_SIMD_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
COAT_SIMD_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
COAT_SIMD_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
COAT_SIMD_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
COAT_SIMD_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
COAT_SIMD_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
COAT_SIMD_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
COAT_SIMD_INLINE F abs(F a) { return _mm512_abs_ps(a); }

// 1 / a for a >= 1, within 1.2e-7; 0 for inf. A division of 16 floats takes 16 cycles, this 4.
COAT_SIMD_INLINE F reciprocal(F a) {
  const F r = _mm512_rcp14_ps(a);
  const M bounded = _mm512_cmp_ps_mask(a, set1(3.40282347e38f), _CMP_NGT_UQ);
  return _mm512_maskz_fmadd_ps(bounded, r, fnma(a, r, set1(1.0f)), r);
}
COAT_SIMD_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
COAT_SIMD_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
COAT_SIMD_INLINE I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
COAT_SIMD_INLINE I umax(I a, I b) { return _mm512_max_epu32(a, b); }
COAT_SIMD_INLINE I umin(I a, I b) { return _mm512_min_epu32(a, b); }
COAT_SIMD_INLINE I and_(I a, I b) { return _mm512_and_si512(a, b); }
COAT_SIMD_INLINE I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
template <int n>
COAT_SIMD_INLINE I shr(I a) {
  return _mm512_srli_epi32(a, n);
}
template <int n>
COAT_SIMD_INLINE I shl(I a) {
  return _mm512_slli_epi32(a, n);
}
COAT_SIMD_INLINE I shr(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }

COAT_SIMD_INLINE M less(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
COAT_SIMD_INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
COAT_SIMD_INLINE M no_bits(I a, I bits) { return _mm512_testn_epi32_mask(a, bits); }
COAT_SIMD_INLINE I select(M m, I yes, I no) { return _mm512_mask_blend_epi32(m, no, yes); }
COAT_SIMD_INLINE I zero_where(M m, I a) { return _mm512_maskz_mov_epi32(static_cast<M>(~m), a); }

COAT_SIMD_INLINE Table16 load16(const void* p) { return {_mm512_loadu_si512(p)}; }
COAT_SIMD_INLINE Table32 load32(const void* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(static_cast<const char*>(p) + 64)}; }
COAT_SIMD_INLINE Table16 scale(Table16 t, F factor) { return {as_int(mul(as_float(t.entries), factor))}; }
COAT_SIMD_INLINE I lookup(Table16 t, I index) { return _mm512_permutexvar_epi32(index, t.entries); }
COAT_SIMD_INLINE I lookup(Table32 t, I index) { return _mm512_permutex2var_epi32(t.first, index, t.second); }
// lookup(t, index) where m, else otherwise.
COAT_SIMD_INLINE I lookup_where(M m, Table16 t, I index, I otherwise) {
  return _mm512_mask_permutexvar_epi32(otherwise, m, index, t.entries);
}

// table[index] of a table in memory. Into zeros: a gather without them waits for the last use of the register it lands in.
COAT_SIMD_INLINE F gather(const float* table, I index) { return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xFFFF, index, table, 4); }
COAT_SIMD_INLINE I gather(const uint32_t* table, I index) {
  return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xFFFF, index, table, 4);
}

// |x| = mantissa * 2^exponent, mantissa in [1, 2), subnormals included; 0 has exponent -inf and mantissa 1.
COAT_SIMD_INLINE void split_normal(F x, F* exponent, F* mantissa) {
  *exponent = _mm512_getexp_ps(x);
  *mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
}
COAT_SIMD_INLINE void split_any(F x, F* exponent, F* mantissa) { split_normal(x, exponent, mantissa); }

// code | the sign of x in bit 7
COAT_SIMD_INLINE I insert_sign(I code, F x) {
  return _mm512_ternarylogic_epi32(code, _mm512_srli_epi32(as_int(x), 24), _mm512_set1_epi32(0x80), 0xF8);
}

COAT_SIMD_INLINE I load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
COAT_SIMD_INLINE I load_i8(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
// The low bytes of one or of four vectors of values in 0..255.
COAT_SIMD_INLINE void store_u8(uint8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }
COAT_SIMD_INLINE void store_u8(uint8_t* p, I a, I b, I c, I d) {
  const __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
  // packing works within 128-bit lanes: dword 4 i + j holds bytes of vector j, lanes 4 i on
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}

COAT_SIMD_INLINE __m256i load_half(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
COAT_SIMD_INLINE void store_half(uint16_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
COAT_SIMD_INLINE F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load_half(p)); }
COAT_SIMD_INLINE void store_f16(uint16_t* p, F x) { store_half(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
COAT_SIMD_INLINE F load_bf16(const uint16_t* p) { return as_float(shl<16>(_mm512_cvtepu16_epi32(load_half(p)))); }
// The float's pattern, rounded to its upper half.
COAT_SIMD_INLINE I round_bf16(F x) {
  const I bits = as_int(x), rounded = add(bits, add(set1(0x7FFF), and_(shr<16>(bits), set1(1))));
  return select(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), set1(0x7FC00000), rounded);
}
COAT_SIMD_INLINE void store_bf16(uint16_t* p, F x) { store_half(p, _mm512_cvtepi32_epi16(shr<16>(round_bf16(x)))); }
COAT_SIMD_INLINE void store_bf16(uint16_t* p, F a, F b) {
  const I upper = add(mul(iota(), set1(0x00040004)), set1(0x00030001));  // 16-bit words 1, 3, 5, ...
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(round_bf16(a), upper, round_bf16(b)));
}

// Whether any of n (a multiple of 32) codes has a magnitude above max_code.
COAT_SIMD_INLINE bool any_above(const uint8_t* codes, int n, int max_code) {
  const __m512i magnitude = _mm512_set1_epi8(0x7F), limit = _mm512_set1_epi8(static_cast<char>(max_code));
  const auto above = [&](__m512i c) { return _mm512_cmpgt_epi8_mask(_mm512_and_si512(c, magnitude), limit); };
  if (n == 32) return above(_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)))) != 0;
  __mmask64 found = 0;
  for (int i = 0; i < n; i += 64) found |= above(_mm512_loadu_si512(codes + i));
  return found != 0;
}

// Lane-wise reductions of four vectors at once: the largest of a and b, the smallest of c and d (unsigned).
COAT_SIMD_INLINE void reduce(I max_a, I max_b, I min_c, I min_d, uint32_t out[4]) {
  const I ones = set1(-1);
  const I c = xor_(min_c, ones), d = xor_(min_d, ones);
  const I ab = umax(_mm512_unpacklo_epi32(max_a, max_b), _mm512_unpackhi_epi32(max_a, max_b));
  const I cd = umax(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const I abcd = umax(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  const __m128i quarter = _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_xor_si128(quarter, _mm_setr_epi32(0, 0, -1, -1)));
}

// Values of FP8 codes, those of e4m3 times 2^-8: both are float16 patterns with bits moved, subnormals and NaN included.
COAT_SIMD_INLINE F load_e5m2(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 8));
}
COAT_SIMD_INLINE F load_e4m3(const uint8_t* p) {
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
  const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0xBFFF)));  // the sign, extended, fills bit 14 too
  const __m256i carry = _mm256_add_epi16(half, _mm256_set1_epi16(0x80));                       // into bit 14 where all seven bits are set
  return _mm512_cvtph_ps(_mm256_ternarylogic_epi32(half, carry, _mm256_set1_epi16(0x4000), 0xF8));
}
COAT_SIMD_INLINE uint32_t reduce_max(I a) { return _mm512_reduce_max_epu32(a); }

}  // namespace coat::COAT_ISA
