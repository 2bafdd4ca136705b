// The compilers' own 16-byte vectors (GCC, Clang) for any processor: SSE2, NEON or plain registers. Included by simd.h.
#pragma once

#include <cmath>

namespace coat::COAT_ISA {

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(16)));
typedef uint32_t I __attribute__((vector_size(16)));
typedef int32_t M __attribute__((vector_size(16)));  // -1 or 0

struct Table16 {
  uint32_t entries[16];
};
struct Table32 {
  const uint32_t* entries;
};

COAT_SIMD_INLINE F set1(float x) { return F{x, x, x, x}; }
COAT_SIMD_INLINE I set1(int32_t x) {
  const auto u = static_cast<uint32_t>(x);
  return I{u, u, u, u};
}
COAT_SIMD_INLINE I iota() { return I{0, 1, 2, 3}; }
template <typename V, typename T>
COAT_SIMD_INLINE V load_as(const T* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}
COAT_SIMD_INLINE F load(const float* p) { return load_as<F>(p); }
COAT_SIMD_INLINE I load(const uint32_t* p) { return load_as<I>(p); }
COAT_SIMD_INLINE void store(float* p, F x) { memcpy(p, &x, sizeof x); }
COAT_SIMD_INLINE void store(uint32_t* p, I x) { memcpy(p, &x, sizeof x); }
COAT_SIMD_INLINE I as_int(F x) { return reinterpret_cast<I>(x); }
COAT_SIMD_INLINE F as_float(I x) { return reinterpret_cast<F>(x); }
COAT_SIMD_INLINE M as_mask(I x) { return reinterpret_cast<M>(x); }
COAT_SIMD_INLINE I as_int(M x) { return reinterpret_cast<I>(x); }
COAT_SIMD_INLINE F to_float(I x) { return __builtin_convertvector(as_mask(x), F); }
COAT_SIMD_INLINE I truncate(F x) { return as_int(__builtin_convertvector(x, M)); }

COAT_SIMD_INLINE I select(M m, I yes, I no) { return (as_int(m) & yes) | (~as_int(m) & no); }
COAT_SIMD_INLINE F select(M m, F yes, F no) { return as_float(select(m, as_int(yes), as_int(no))); }
COAT_SIMD_INLINE I zero_where(M m, I a) { return ~as_int(m) & a; }
COAT_SIMD_INLINE M less(I a, I b) { return as_mask(a) < as_mask(b); }
COAT_SIMD_INLINE M less(F a, F b) { return a < b; }
COAT_SIMD_INLINE M no_bits(I a, I bits) { return (a & bits) == I{0, 0, 0, 0}; }

COAT_SIMD_INLINE F add(F a, F b) { return a + b; }
COAT_SIMD_INLINE F sub(F a, F b) { return a - b; }
COAT_SIMD_INLINE F mul(F a, F b) { return a * b; }
COAT_SIMD_INLINE F div(F a, F b) { return a / b; }
COAT_SIMD_INLINE F sqrt(F a) { return F{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])}; }
COAT_SIMD_INLINE F fma(F a, F b, F c) { return a * b + c; }
COAT_SIMD_INLINE F fnma(F a, F b, F c) { return c - a * b; }
COAT_SIMD_INLINE F min(F a, F b) { return select(a < b, a, b); }
COAT_SIMD_INLINE F max(F a, F b) { return select(a > b, a, b); }
COAT_SIMD_INLINE F abs(F a) { return as_float(as_int(a) & set1(static_cast<int32_t>(kAbsMask))); }

// 1 / a for a >= 1, within 1.2e-7; 0 for inf.
COAT_SIMD_INLINE F reciprocal(F a) { return div(set1(1.0f), a); }

COAT_SIMD_INLINE I add(I a, I b) { return a + b; }
COAT_SIMD_INLINE I sub(I a, I b) { return a - b; }
COAT_SIMD_INLINE I mul(I a, I b) { return a * b; }
COAT_SIMD_INLINE I umax(I a, I b) { return select(a > b, a, b); }
COAT_SIMD_INLINE I umin(I a, I b) { return select(a < b, a, b); }
COAT_SIMD_INLINE I and_(I a, I b) { return a & b; }
COAT_SIMD_INLINE I xor_(I a, I b) { return a ^ b; }
COAT_SIMD_INLINE I shr(I a, int n) { return a >> n; }
template <int n>
COAT_SIMD_INLINE I shr(I a) {
  return a >> n;
}
template <int n>
COAT_SIMD_INLINE I shl(I a) {
  return a << n;
}

COAT_SIMD_INLINE Table16 load16(const void* p) { return load_as<Table16>(p); }
COAT_SIMD_INLINE Table32 load32(const void* p) { return {static_cast<const uint32_t*>(p)}; }
COAT_SIMD_INLINE Table16 scale(Table16 t, F factor) {
  for (int i = 0; i < 16; i += kLanes) store(t.entries + i, as_int(as_float(load(t.entries + i)) * factor));
  return t;
}
COAT_SIMD_INLINE I lookup(const Table16& t, I index) {
  return I{t.entries[index[0] & 15], t.entries[index[1] & 15], t.entries[index[2] & 15], t.entries[index[3] & 15]};
}
COAT_SIMD_INLINE I lookup(Table32 t, I index) {
  return I{t.entries[index[0] & 31], t.entries[index[1] & 31], t.entries[index[2] & 31], t.entries[index[3] & 31]};
}
// lookup(t, index) where m, else otherwise.
COAT_SIMD_INLINE I lookup_where(M m, const Table16& t, I index, I otherwise) { return select(m, lookup(t, index), otherwise); }

// table[index] of a table in memory.
COAT_SIMD_INLINE F gather(const float* table, I index) { return F{table[index[0]], table[index[1]], table[index[2]], table[index[3]]}; }
COAT_SIMD_INLINE I gather(const uint32_t* table, I index) { return I{table[index[0]], table[index[1]], table[index[2]], table[index[3]]}; }

// |x| = mantissa * 2^exponent, mantissa in [1, 2). x is normal.
COAT_SIMD_INLINE void split_normal(F x, F* exponent, F* mantissa) {
  const I bits = as_int(abs(x));
  *exponent = to_float((bits >> 23) - set1(127));
  *mantissa = as_float((bits & set1(0x007FFFFF)) | set1(0x3F800000));
}
// Any finite x; 0 reads as a number below all others.
COAT_SIMD_INLINE void split_any(F x, F* exponent, F* mantissa) {
  const M small = less(as_int(abs(x)), set1(static_cast<int32_t>(kMinNormalBits)));
  split_normal(select(small, x * set1(33554432.0f), x), exponent, mantissa);  // 2^25
  *exponent = *exponent - select(small, set1(25.0f), set1(0.0f));
}

COAT_SIMD_INLINE I insert_sign(I code, F x) { return code | ((as_int(x) >> 24) & set1(0x80)); }

COAT_SIMD_INLINE I load_u8(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
COAT_SIMD_INLINE I load_i8(const uint8_t* p) { return (load_u8(p) ^ set1(0x80)) - set1(0x80); }
COAT_SIMD_INLINE void store_u8(uint8_t* p, I a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(a[i]);
}
COAT_SIMD_INLINE void store_u8(uint8_t* p, I a, I b, I c, I d) {
  store_u8(p, a);
  store_u8(p + kLanes, b);
  store_u8(p + 2 * kLanes, c);
  store_u8(p + 3 * kLanes, d);
}

COAT_SIMD_INLINE F load_f16(const uint16_t* p) { return F{from_float16(p[0]), from_float16(p[1]), from_float16(p[2]), from_float16(p[3])}; }
COAT_SIMD_INLINE F load_bf16(const uint16_t* p) { return as_float(I{p[0], p[1], p[2], p[3]} << 16); }
COAT_SIMD_INLINE void store_f16(uint16_t* p, F x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_float16(x[i]);
}
COAT_SIMD_INLINE void store_bf16(uint16_t* p, F x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_bfloat16(x[i]);
}
COAT_SIMD_INLINE void store_bf16(uint16_t* p, F a, F b) {
  store_bf16(p, a);
  store_bf16(p + kLanes, b);
}

// Whether any of n (a multiple of 32) codes has a magnitude above max_code.
COAT_SIMD_INLINE bool any_above(const uint8_t* codes, int n, int max_code) {
  bool found = false;
  for (int i = 0; i < n; ++i) found |= (codes[i] & 0x7F) > max_code;
  return found;
}

// Lane-wise reductions of four vectors at once: the largest of a and b, the smallest of c and d (unsigned).
COAT_SIMD_INLINE void reduce(I max_a, I max_b, I min_c, I min_d, uint32_t out[4]) {
  for (int k = 0; k < 4; ++k) out[k] = k < 2 ? 0 : 0xFFFFFFFFu;
  for (int i = 0; i < kLanes; ++i) {
    out[0] = max_a[i] > out[0] ? max_a[i] : out[0];
    out[1] = max_b[i] > out[1] ? max_b[i] : out[1];
    out[2] = min_c[i] < out[2] ? min_c[i] : out[2];
    out[3] = min_d[i] < out[3] ? min_d[i] : out[3];
  }
}

// Values of FP8 codes, those of e4m3 times 2^-8: both are float16 patterns with bits moved, subnormals and NaN included.
COAT_SIMD_INLINE F load_e5m2(const uint8_t* p) {
  const I code = load_u8(p), magnitude = code & set1(0x7F);
  const F normal = as_float((magnitude << 21) + set1(112 << 23)), subnormal = to_float(magnitude) * set1(1.52587890625e-05f);  // 2^-16
  const F finite = select(less(magnitude, set1(4)), subnormal, normal);
  const F value = select(less(magnitude, set1(0x7C)), finite, as_float((magnitude << 21) | set1(static_cast<int32_t>(kInfBits))));
  return as_float(as_int(value) | (code >> 7 << 31));
}
COAT_SIMD_INLINE F load_e4m3(const uint8_t* p) {
  const I code = load_u8(p), magnitude = code & set1(0x7F);
  const F normal = as_float((magnitude << 20) + set1(112 << 23)), subnormal = to_float(magnitude) * set1(7.62939453125e-06f);  // 2^-17
  const F finite = select(less(magnitude, set1(8)), subnormal, normal);
  const F value = select(less(magnitude, set1(0x7F)), finite, as_float(set1(static_cast<int32_t>(kNanBits))));
  return as_float(as_int(value) | (code >> 7 << 31));
}
COAT_SIMD_INLINE uint32_t reduce_max(I a) {
  const uint32_t low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
  return low > high ? low : high;
}

}  // namespace coat::COAT_ISA
