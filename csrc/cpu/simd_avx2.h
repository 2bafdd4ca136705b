// AVX2, FMA and F16C. Included by simd.h.
#pragma once

#include <immintrin.h>

namespace coat::COAT_ISA {

constexpr int kLanes = 8;
using F = __m256;
using I = __m256i;
struct M {
  __m256i bits;
};

struct Table16 {
  __m256i first, second;
};
struct Table32 {
  const int32_t* entries;
};

COAT_SIMD_INLINE F set1(float x) { return _mm256_set1_ps(x); }
COAT_SIMD_INLINE I set1(int32_t x) { return _mm256_set1_epi32(x); }
COAT_SIMD_INLINE I iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
COAT_SIMD_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
COAT_SIMD_INLINE I load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
COAT_SIMD_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
COAT_SIMD_INLINE void store(uint32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
COAT_SIMD_INLINE I as_int(F x) { return _mm256_castps_si256(x); }
COAT_SIMD_INLINE F as_float(I x) { return _mm256_castsi256_ps(x); }
COAT_SIMD_INLINE F to_float(I x) { return _mm256_cvtepi32_ps(x); }
COAT_SIMD_INLINE I truncate(F x) { return _mm256_cvttps_epi32(x); }

COAT_SIMD_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
COAT_SIMD_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
COAT_SIMD_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
COAT_SIMD_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
COAT_SIMD_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
COAT_SIMD_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
COAT_SIMD_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
COAT_SIMD_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
COAT_SIMD_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
COAT_SIMD_INLINE F abs(F a) { return _mm256_and_ps(a, as_float(set1(0x7FFFFFFF))); }

// 1 / a for a >= 1, within 1.2e-7; 0 for inf.
COAT_SIMD_INLINE F reciprocal(F a) { return div(set1(1.0f), a); }

COAT_SIMD_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
COAT_SIMD_INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
COAT_SIMD_INLINE I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
COAT_SIMD_INLINE I umax(I a, I b) { return _mm256_max_epu32(a, b); }
COAT_SIMD_INLINE I umin(I a, I b) { return _mm256_min_epu32(a, b); }
COAT_SIMD_INLINE I and_(I a, I b) { return _mm256_and_si256(a, b); }
COAT_SIMD_INLINE I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
template <int n>
COAT_SIMD_INLINE I shr(I a) {
  return _mm256_srli_epi32(a, n);
}
template <int n>
COAT_SIMD_INLINE I shl(I a) {
  return _mm256_slli_epi32(a, n);
}
COAT_SIMD_INLINE I shr(I a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }

COAT_SIMD_INLINE M less(I a, I b) { return {_mm256_cmpgt_epi32(b, a)}; }
COAT_SIMD_INLINE M less(F a, F b) { return {as_int(_mm256_cmp_ps(a, b, _CMP_LT_OQ))}; }
COAT_SIMD_INLINE M no_bits(I a, I bits) { return {_mm256_cmpeq_epi32(and_(a, bits), _mm256_setzero_si256())}; }
COAT_SIMD_INLINE I select(M m, I yes, I no) { return _mm256_blendv_epi8(no, yes, m.bits); }
COAT_SIMD_INLINE I zero_where(M m, I a) { return _mm256_andnot_si256(m.bits, a); }

COAT_SIMD_INLINE Table16 load16(const void* p) {
  const auto* halves = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
COAT_SIMD_INLINE Table32 load32(const void* p) { return {static_cast<const int32_t*>(p)}; }
COAT_SIMD_INLINE Table16 scale(Table16 t, F factor) {
  return {as_int(mul(as_float(t.first), factor)), as_int(mul(as_float(t.second), factor))};
}
COAT_SIMD_INLINE I lookup(Table16 t, I index) {
  const F first = as_float(_mm256_permutevar8x32_epi32(t.first, index)), second = as_float(_mm256_permutevar8x32_epi32(t.second, index));
  return as_int(_mm256_blendv_ps(first, second, as_float(shl<28>(index))));
}
COAT_SIMD_INLINE I lookup(Table32 t, I index) { return _mm256_i32gather_epi32(t.entries, and_(index, set1(31)), 4); }
// lookup(t, index) where m, else otherwise.
COAT_SIMD_INLINE I lookup_where(M m, Table16 t, I index, I otherwise) { return select(m, lookup(t, index), otherwise); }

// table[index] of a table in memory.
COAT_SIMD_INLINE F gather(const float* table, I index) { return _mm256_i32gather_ps(table, index, 4); }
COAT_SIMD_INLINE I gather(const uint32_t* table, I index) { return _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), index, 4); }

// |x| = mantissa * 2^exponent, mantissa in [1, 2). x is normal.
COAT_SIMD_INLINE void split_normal(F x, F* exponent, F* mantissa) {
  const I bits = as_int(abs(x));
  *exponent = _mm256_cvtepi32_ps(sub(shr<23>(bits), set1(127)));
  *mantissa = as_float(_mm256_or_si256(and_(bits, set1(0x007FFFFF)), set1(0x3F800000)));
}
// Any finite x; 0 reads as a number below all others.
COAT_SIMD_INLINE void split_any(F x, F* exponent, F* mantissa) {
  const M small = less(abs(x), set1(1.17549435e-38f));
  const F scaled = as_float(select(small, as_int(mul(x, set1(33554432.0f))), as_int(x)));  // 2^25
  split_normal(scaled, exponent, mantissa);
  *exponent = sub(*exponent, as_float(and_(small.bits, as_int(set1(25.0f)))));
}

COAT_SIMD_INLINE I insert_sign(I code, F x) { return _mm256_or_si256(code, and_(shr<24>(as_int(x)), set1(0x80))); }

COAT_SIMD_INLINE I load_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
COAT_SIMD_INLINE I load_i8(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
COAT_SIMD_INLINE __m128i narrow(I a) { return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)); }
COAT_SIMD_INLINE void store_u8(uint8_t* p, I a) {
  const __m128i words = narrow(a);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
COAT_SIMD_INLINE void store_u8(uint8_t* p, I a, I b, I c, I d) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
}

COAT_SIMD_INLINE __m128i load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
COAT_SIMD_INLINE void store_half(uint16_t* p, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }
COAT_SIMD_INLINE F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(load_half(p)); }
COAT_SIMD_INLINE void store_f16(uint16_t* p, F x) { store_half(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
COAT_SIMD_INLINE F load_bf16(const uint16_t* p) { return as_float(shl<16>(_mm256_cvtepu16_epi32(load_half(p)))); }
COAT_SIMD_INLINE void store_bf16(uint16_t* p, F x) {
  const I bits = as_int(x);
  const I rounded = shr<16>(add(bits, add(set1(0x7FFF), and_(shr<16>(bits), set1(1)))));
  const M nan = {as_int(_mm256_cmp_ps(x, x, _CMP_UNORD_Q))};
  store_half(p, narrow(select(nan, set1(0x7FC0), rounded)));
}
COAT_SIMD_INLINE void store_bf16(uint16_t* p, F a, F b) {
  store_bf16(p, a);
  store_bf16(p + kLanes, b);
}

COAT_SIMD_INLINE bool any_above(const uint8_t* codes, int n, int max_code) {
  const __m256i magnitude = _mm256_set1_epi8(0x7F), limit = _mm256_set1_epi8(static_cast<char>(max_code));
  __m256i found = _mm256_setzero_si256();
  for (int i = 0; i < n; i += 32) {
    const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    found = _mm256_or_si256(found, _mm256_cmpgt_epi8(_mm256_and_si256(c, magnitude), limit));
  }
  return !_mm256_testz_si256(found, found);
}

COAT_SIMD_INLINE void reduce(I max_a, I max_b, I min_c, I min_d, uint32_t out[4]) {
  const I ones = set1(-1);
  const I c = xor_(min_c, ones), d = xor_(min_d, ones);
  const I ab = umax(_mm256_unpacklo_epi32(max_a, max_b), _mm256_unpackhi_epi32(max_a, max_b));
  const I cd = umax(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  const I abcd = umax(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  const __m128i quarter = _mm_max_epu32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_xor_si128(quarter, _mm_setr_epi32(0, 0, -1, -1)));
}

// Values of FP8 codes, those of e4m3 times 2^-8: both are float16 patterns with bits moved, subnormals and NaN included.
COAT_SIMD_INLINE F load_e5m2(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 8));
}
COAT_SIMD_INLINE F load_e4m3(const uint8_t* p) {
  const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 7);
  const __m128i half = _mm_and_si128(wide, _mm_set1_epi16(static_cast<short>(0xBFFF)));  // the sign, extended, fills bit 14 too
  const __m128i carry = _mm_add_epi16(half, _mm_set1_epi16(0x80));                       // into bit 14 where all seven bits are set
  return _mm256_cvtph_ps(_mm_or_si128(half, _mm_and_si128(carry, _mm_set1_epi16(0x4000))));
}
COAT_SIMD_INLINE uint32_t reduce_max(I a) {
  const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xB1))));
}

}  // namespace coat::COAT_ISA
