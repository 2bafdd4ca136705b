// Plain loops for any processor; the compiler vectorizes what it can. Included by simd.h.
#pragma once

#include <cmath>

namespace coat::COAT_ISA {

constexpr int kLanes = 8;
struct F {
  float v[kLanes];
};
struct I {
  uint32_t v[kLanes];
};
struct M {
  bool v[kLanes];
};

struct Table16 {
  uint32_t entries[16];
};
struct Table32 {
  const uint32_t* entries;
};

template <typename R, typename Fn>
COAT_SIMD_INLINE R each(Fn fn) {
  R r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = fn(i);
  return r;
}

COAT_SIMD_INLINE F set1(float x) {
  return each<F>([=](int) { return x; });
}
COAT_SIMD_INLINE I set1(int32_t x) {
  return each<I>([=](int) { return static_cast<uint32_t>(x); });
}
COAT_SIMD_INLINE I iota() {
  return each<I>([](int i) { return static_cast<uint32_t>(i); });
}
COAT_SIMD_INLINE F load(const float* p) {
  return each<F>([=](int i) { return p[i]; });
}
COAT_SIMD_INLINE void store(float* p, const F& x) { memcpy(p, x.v, sizeof x.v); }
COAT_SIMD_INLINE void store(uint32_t* p, const I& x) { memcpy(p, x.v, sizeof x.v); }
COAT_SIMD_INLINE I as_int(const F& x) {
  return each<I>([&](int i) { return float_bits(x.v[i]); });
}
COAT_SIMD_INLINE F as_float(const I& x) {
  return each<F>([&](int i) { return bits_float(x.v[i]); });
}

#define COAT_BINARY(T, name, expression)                 \
  COAT_SIMD_INLINE T name(const T& a, const T& b) {      \
    return each<T>([&](int i) {                          \
      const auto x = a.v[i], y = b.v[i];                 \
      return expression;                                 \
    });                                                  \
  }
COAT_BINARY(F, add, x + y)
COAT_BINARY(F, sub, x - y)
COAT_BINARY(F, mul, x* y)
COAT_BINARY(F, div, x / y)
COAT_BINARY(F, min, x < y ? x : y)
COAT_BINARY(F, max, x > y ? x : y)
COAT_BINARY(I, add, x + y)
COAT_BINARY(I, sub, x - y)
COAT_BINARY(I, mul, x* y)
COAT_BINARY(I, umax, x > y ? x : y)
COAT_BINARY(I, umin, x < y ? x : y)
COAT_BINARY(I, and_, x& y)
COAT_BINARY(I, xor_, x ^ y)
#undef COAT_BINARY

COAT_SIMD_INLINE F sqrt(const F& a) {
  return each<F>([&](int i) { return std::sqrt(a.v[i]); });
}
COAT_SIMD_INLINE F fma(const F& a, const F& b, const F& c) { return add(mul(a, b), c); }
COAT_SIMD_INLINE F fnma(const F& a, const F& b, const F& c) { return sub(c, mul(a, b)); }
COAT_SIMD_INLINE F abs(const F& a) {
  return each<F>([&](int i) { return bits_float(float_bits(a.v[i]) & kAbsMask); });
}
COAT_SIMD_INLINE I shr(const I& a, int n) {
  return each<I>([&](int i) { return a.v[i] >> n; });
}
template <int n>
COAT_SIMD_INLINE I shr(const I& a) {
  return shr(a, n);
}
template <int n>
COAT_SIMD_INLINE I shl(const I& a) {
  return each<I>([&](int i) { return a.v[i] << n; });
}

COAT_SIMD_INLINE M less(const I& a, const I& b) {
  return each<M>([&](int i) { return static_cast<int32_t>(a.v[i]) < static_cast<int32_t>(b.v[i]); });
}
COAT_SIMD_INLINE M less(const F& a, const F& b) {
  return each<M>([&](int i) { return a.v[i] < b.v[i]; });
}
COAT_SIMD_INLINE M no_bits(const I& a, const I& bits) {
  return each<M>([&](int i) { return (a.v[i] & bits.v[i]) == 0; });
}
COAT_SIMD_INLINE I select(const M& m, const I& yes, const I& no) {
  return each<I>([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
}
COAT_SIMD_INLINE I zero_where(const M& m, const I& a) {
  return each<I>([&](int i) { return m.v[i] ? 0u : a.v[i]; });
}

COAT_SIMD_INLINE Table16 load16(const void* p) {
  Table16 t;
  memcpy(t.entries, p, sizeof t.entries);
  return t;
}
COAT_SIMD_INLINE Table32 load32(const void* p) { return {static_cast<const uint32_t*>(p)}; }
COAT_SIMD_INLINE Table16 scale(Table16 t, const F& factor) {
  for (uint32_t& entry : t.entries) entry = float_bits(bits_float(entry) * factor.v[0]);
  return t;
}
COAT_SIMD_INLINE I lookup(const Table16& t, const I& index) {
  return each<I>([&](int i) { return t.entries[index.v[i] & 15]; });
}
COAT_SIMD_INLINE I lookup(const Table32& t, const I& index) {
  return each<I>([&](int i) { return t.entries[index.v[i] & 31]; });
}
template <typename Table>
COAT_SIMD_INLINE I lookup_where(const M& m, const Table& t, const I& index, const I& otherwise) {
  return select(m, lookup(t, index), otherwise);
}

// |x| = mantissa * 2^exponent, mantissa in [1, 2). x is normal.
COAT_SIMD_INLINE void split_normal(const F& x, F* exponent, F* mantissa) {
  *exponent = each<F>([&](int i) { return static_cast<float>(static_cast<int>((float_bits(x.v[i]) & kAbsMask) >> 23) - 127); });
  *mantissa = each<F>([&](int i) { return bits_float((float_bits(x.v[i]) & 0x007FFFFF) | 0x3F800000); });
}
// Any finite x; 0 reads as a number below all others.
COAT_SIMD_INLINE void split_any(const F& x, F* exponent, F* mantissa) {
  const auto small = [&](int i) { return (float_bits(x.v[i]) & kAbsMask) < kMinNormalBits; };
  split_normal(each<F>([&](int i) { return small(i) ? x.v[i] * 33554432.0f : x.v[i]; }), exponent, mantissa);  // 2^25
  for (int i = 0; i < kLanes; ++i) exponent->v[i] -= small(i) ? 25.0f : 0.0f;
}

COAT_SIMD_INLINE I insert_sign(const I& code, const F& x) {
  return each<I>([&](int i) { return code.v[i] | ((float_bits(x.v[i]) >> 24) & 0x80); });
}

COAT_SIMD_INLINE I load_u8(const uint8_t* p) {
  return each<I>([=](int i) { return static_cast<uint32_t>(p[i]); });
}
COAT_SIMD_INLINE void store_u8(uint8_t* p, const I& a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
}
COAT_SIMD_INLINE void store_u8(uint8_t* p, const I& a, const I& b, const I& c, const I& d) {
  store_u8(p, a);
  store_u8(p + kLanes, b);
  store_u8(p + 2 * kLanes, c);
  store_u8(p + 3 * kLanes, d);
}

COAT_SIMD_INLINE F load_f16(const uint16_t* p) {
  return each<F>([=](int i) { return from_float16(p[i]); });
}
COAT_SIMD_INLINE F load_bf16(const uint16_t* p) {
  return each<F>([=](int i) { return from_bfloat16(p[i]); });
}
COAT_SIMD_INLINE void store_f16(uint16_t* p, const F& x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_float16(x.v[i]);
}
COAT_SIMD_INLINE void store_bf16(uint16_t* p, const F& x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_bfloat16(x.v[i]);
}

COAT_SIMD_INLINE bool any_above(const uint8_t* codes, int n, int max_code) {
  bool found = false;
  for (int i = 0; i < n; ++i) found |= (codes[i] & 0x7F) > max_code;
  return found;
}

COAT_SIMD_INLINE void reduce(const I& max_a, const I& max_b, const I& min_c, const I& min_d, uint32_t out[4]) {
  for (int k = 0; k < 4; ++k) out[k] = k < 2 ? 0 : 0xFFFFFFFFu;
  for (int i = 0; i < kLanes; ++i) {
    out[0] = max_a.v[i] > out[0] ? max_a.v[i] : out[0];
    out[1] = max_b.v[i] > out[1] ? max_b.v[i] : out[1];
    out[2] = min_c.v[i] < out[2] ? min_c.v[i] : out[2];
    out[3] = min_d.v[i] < out[3] ? min_d.v[i] : out[3];
  }
}

}  // namespace coat::COAT_ISA
