// float32 to codes, a group at a time.
//
// The logarithm-based codes need no exp2: Y = slope * log2|x| + offset comes out of one polynomial in fixed point, and an
// integer addition from a table rounds it (tables.h). Groups with zeros, subnormals, extreme ranges or non-finite values take
// the careful variant of the same kernel.
#pragma once

#include "../formats/random.h"
#include "simd.h"

namespace coat::COAT_ISA {

struct GroupStats {
  uint32_t max_bits, min_bits;  // of |x|; zeros and NaN count
};

// Minimax polynomials of log2 on [1, 2), own fits. Degree 5 in m: error 1.25e-5; at k = 3 that moves 0.02 % of e4m3 codes.
constexpr int kFastDegree = 5, kCarefulDegree = 7;
constexpr float kFastLog2[8] = {-2.80036402f, 5.09171104f, -3.55079293f, 1.63114882f, -0.416563690f, 0.0448736101f, 0.0f, 0.0f};
// Degree 7 in m - 1: error 2.8e-7.
constexpr float kCarefulLog2[8] = {2.77289502e-7f, 1.44265628f,  -0.720453024f,  0.472897917f,
                                   -0.324253917f,  0.192089543f, -0.0780621246f, 0.0151253594f};

struct Coefficients {
  float c[8];
  float slope;
};

// Coefficients of Y with Y(amax) = target, kFixedMagic added.
template <bool kCareful>
COAT_SIMD_INLINE Coefficients make_coefficients(float slope, double target, float amax) {
  const float* poly = kCareful ? kCarefulLog2 : kFastLog2;
  constexpr int degree = kCareful ? kCarefulDegree : kFastDegree;
  int subnormal_exponent = 0;
  if (kCareful && amax < bits_float(kMinNormalBits)) {
    amax *= 33554432.0f;  // 2^25
    subnormal_exponent = -25;
  }
  const uint32_t bits = float_bits(amax);
  const int exponent = static_cast<int>(bits >> 23) - 127 + subnormal_exponent;
  const double m = bits_float((bits & 0x007FFFFF) | 0x3F800000) - (kCareful ? 1.0 : 0.0);
  Coefficients out;
  double log2_amax = poly[degree];
  for (int i = degree - 1; i > 0; --i) log2_amax = log2_amax * m + poly[i];
  for (int i = 1; i < 8; ++i) out.c[i] = slope * poly[i];
  out.slope = slope;
  // poly[0] cancels: it is in log2|x| and in log2 amax
  out.c[0] = static_cast<float>(kFixedMagic + target - static_cast<double>(slope) * (exponent + log2_amax * m));
  return out;
}

template <bool kCareful>
COAT_SIMD_INLINE F fixed_log2(const Coefficients& k, F x) {
  F exponent, m;
  if (kCareful) {
    split_any(x, &exponent, &m);
    m = sub(m, set1(1.0f));
  } else {
    split_normal(x, &exponent, &m);
  }
  F sum = kCareful ? fma(fma(set1(k.c[7]), m, set1(k.c[6])), m, set1(k.c[5])) : set1(k.c[5]);
  for (int i = 4; i >= 0; --i) sum = fma(sum, m, set1(k.c[i]));
  return fma(exponent, set1(k.slope), sum);
}

// Runs code_of(i) on every vector of a group and stores the bytes.
template <typename CodeOf>
COAT_SIMD_INLINE void store_codes(uint8_t* codes, int n, CodeOf code_of) {
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    store_u8(codes + i, code_of(i), code_of(i + kLanes), code_of(i + 2 * kLanes), code_of(i + 3 * kLanes));
  }
  for (; i < n; i += kLanes) store_u8(codes + i, code_of(i));
}

template <bool kCareful, bool kSigned>
static void encode_expanded(const Coefficients& k, const BucketTable& table, const float* x, int n, uint8_t* codes) {
  const Table32 low = load32(table.low);
  const Table16 normal = load16(table.normal);
  const I low_end = set1(table.low_end);
  store_codes(codes, n, [&](int i) __attribute__((always_inline)) {
    const F value = load(x + i);
    F y = fixed_log2<kCareful>(k, value);
    if (kCareful) y = max(y, set1(table.lowest));
    const I bits = as_int(y), bucket = shr<kFraction>(bits);
    const I entry = lookup_where(less(bits, low_end), low, bucket, lookup(normal, bucket));
    I code = shr<kFraction>(add(bits, entry));
    if (kSigned) code = insert_sign(code, value);
    return kCareful ? zero_where(no_bits(as_int(value), set1(0x7FFFFFFF)), code) : code;
  });
}

// noise: 255 - the random byte of each element, where stochastic.
template <bool kCareful, bool kStochastic>
static void encode_log8(const Coefficients& k, const DitherTable* dither, const float* x, int n, const uint8_t* noise, uint8_t* codes) {
  const Table32 entries = load32(dither->entry);
  const I half = set1((1 << (kFraction - 1)) - static_cast<int32_t>(float_bits(kFixedMagic)));
  constexpr float one = 1 << kFraction;
  store_codes(codes, n, [&](int i) __attribute__((always_inline)) {
    const F value = load(x + i);
    F y = fixed_log2<kCareful>(k, value);
    if (kCareful) y = min(max(y, set1(kFixedMagic + one)), set1(kFixedMagic + 255 * one));
    I bits = as_int(y);
    if (kStochastic) {
      bits = add(add(bits, lookup(entries, shr<kFraction - 5>(bits))), shl<kFraction - 8>(load_u8(noise + i)));
    } else {
      bits = add(bits, half);
    }
    const I code = shr<kFraction>(bits);
    return kCareful ? zero_where(no_bits(as_int(value), set1(0x7FFFFFFF)), code) : code;
  });
}

static inline void encode_plain(const GroupFormat& format, const float* x, float amax, uint8_t* codes) {
  const CodecSpec spec = codec_spec(format.codec);
  const float scale = amax / spec.max;
  const int shift = 23 - spec.mantissa_bits;
  const F divisor = set1(scale > 0 ? scale : 1.0f), top = set1(spec.max);
  const F min_normal = as_float(set1((128 - spec.bias) << 23));
  const F unit = as_float(set1((127 + 24 - spec.bias - spec.mantissa_bits) << 23));  // its last bit is the subnormal step
  const I rebias = set1((127 - spec.bias) << spec.mantissa_bits);
  const I keep = set1(format.keep_nonzero || scale == 0 ? 1 : 0), none = set1(0);
  store_codes(codes, format.group_size, [&](int i) __attribute__((always_inline)) {
    const F value = load(x + i);
    const F q = scale > 0 ? min(div(abs(value), divisor), top) : as_float(none);
    const I bits = as_int(q);
    const I rounded = add(bits, add(set1((1 << (shift - 1)) - 1), and_(shr(bits, shift), set1(1))));
    const I normal = sub(shr(rounded, shift), rebias);
    const I subnormal = sub(as_int(add(q, unit)), as_int(unit));
    const I code = umax(select(less(q, min_normal), subnormal, normal), keep);
    const I flushed = zero_where(no_bits(as_int(value), set1(0x7FFFFFFF)), code);
    return zero_where(no_bits(flushed, set1(0x7F)), insert_sign(flushed, value));
  });
}

// Replaces nearest FP8 codes by stochastic ones.
static inline void dither_fp8(const GroupFormat& format, const float* x, float amax, uint8_t meta, const uint8_t* noise, uint8_t* codes) {
  float values[128];
  for (int code = 0; code < 128; ++code) values[code] = decode_exact(format.codec, amax, meta, static_cast<uint8_t>(code));
  for (int i = 0; i < format.group_size; ++i) {
    const float magnitude = bits_float(float_bits(x[i]) & kAbsMask);
    int below = codes[i] & 0x7F;
    if (values[below] > magnitude && below > 0) --below;
    const int above = below < format.max_code ? below + 1 : below;
    const float low = values[below], high = values[above];
    const float probability = high > low ? (magnitude - low) / (high - low) : 0.0f;
    const float u = (static_cast<float>(255 - noise[i]) + 0.5f) / 256.0f;
    int code = u < probability ? above : below;
    if (format.keep_nonzero && magnitude > 0 && code == 0) code = 1;
    codes[i] = static_cast<uint8_t>(code | (code > 0 && x[i] < 0 ? 0x80 : 0));
  }
}

// 255 - the random byte of elements first .. first + n - 1; first is a multiple of 4.
static inline void fill_noise(uint32_t key, int64_t first, int n, uint8_t* noise) {
  const I start = set1(static_cast<int32_t>(key + static_cast<uint32_t>(first >> 2) * kGolden));
  I counter = add(start, mul(iota(), set1(static_cast<int32_t>(kGolden))));
  const I step = set1(static_cast<int32_t>(kGolden * static_cast<uint32_t>(kLanes)));
  uint32_t words[kMaxGroup / 4];
  for (int i = 0; i < n / 4; i += kLanes) {
    I h = counter;
    h = mul(xor_(h, shr<16>(h)), set1(static_cast<int32_t>(kMix1)));
    h = mul(xor_(h, shr<13>(h)), set1(static_cast<int32_t>(kMix2)));
    h = xor_(xor_(h, shr<16>(h)), set1(-1));
    if (i + kLanes <= n / 4) {
      store(words + i, h);
    } else {
      uint32_t last[kLanes];
      store(last, h);
      memcpy(words + i, last, static_cast<size_t>(n / 4 - i) * 4);
    }
    counter = add(counter, step);
  }
  memcpy(noise, words, static_cast<size_t>(n));
}

template <bool kCareful>
static void encode_finite(const GroupFormat& format, const float* x, float amax, uint8_t meta, const uint8_t* noise, uint8_t* codes) {
  constexpr float one = 1 << kFraction;
  const int n = format.group_size;
  if (format.codec == Codec::kLog8) {
    const Coefficients k = make_coefficients<kCareful>(250 * one / static_cast<float>(meta), 255 * static_cast<double>(one), amax);
    const DitherTable* dither = &format.dither[meta];
    if (format.stochastic) return encode_log8<kCareful, true>(k, dither, x, n, noise, codes);
    return encode_log8<kCareful, false>(k, dither, x, n, noise, codes);
  }
  const BucketTable& table = *format.buckets;
  const float slope = table.buckets_per_octave * (one / 16) * static_cast<float>(meta);
  const Coefficients k = make_coefficients<kCareful>(slope, static_cast<double>(table.top), amax);
  if (format.has_signs) return encode_expanded<kCareful, true>(k, table, x, n, codes);
  encode_expanded<kCareful, false>(k, table, x, n, codes);
}

static inline GroupStats group_stats(const float* x, int n) {
  I max_bits = set1(0), min_bits = set1(-1);
  for (int i = 0; i < n; i += kLanes) {
    const I bits = as_int(abs(load(x + i)));
    max_bits = umax(max_bits, bits);
    min_bits = umin(min_bits, bits);
  }
  uint32_t out[4];
  reduce(max_bits, max_bits, min_bits, min_bits, out);
  return {out[0], out[2]};
}

static inline uint32_t smallest_nonzero(const float* x, int n) {
  const I one = set1(1);
  I lowest = set1(-1);  // of bits - 1, so that 0 is the largest
  for (int i = 0; i < n; i += kLanes) lowest = umin(lowest, sub(as_int(abs(load(x + i))), one));
  uint32_t out[4];
  reduce(lowest, lowest, lowest, lowest, out);
  return out[2] + 1;
}

// Writes one group's codes, amax and metadata byte. stats are those of x; key and first (the group's first element in its
// tensor) are for stochastic rounding.
static inline void encode_group(const GroupFormat& format, const float* x, GroupStats stats, uint32_t key, int64_t first,
                                uint8_t* codes, float* amax, uint8_t* meta) {
  const int n = format.group_size;
  const float* given = x;
  float finite[kMaxGroup];
  if (stats.max_bits >= kInfBits) {
    for (int i = 0; i < n; ++i) finite[i] = is_finite(x[i]) ? x[i] : 0.0f;
    x = finite;
    stats = group_stats(x, n);
  }
  bool careful = stats.min_bits < kMinNormalBits;
  if (careful && stats.max_bits > 0) stats.min_bits = smallest_nonzero(x, n);
  *amax = bits_float(stats.max_bits);
  *meta = group_meta(format.codec, stats.max_bits, stats.min_bits);
  if (stats.max_bits == 0) {
    memset(codes, 0, static_cast<size_t>(n));
  } else {
    uint8_t noise[kMaxGroup];
    if (format.stochastic) fill_noise(key, first, n, noise);
    const bool is_log8 = format.codec == Codec::kLog8;
    if (is_log8) {
      careful |= *meta < 4 || *meta == 255;
    } else {
      careful |= stats.max_bits - stats.min_bits >= static_cast<uint32_t>(kMaxOctaves) << 23;
    }
    if (!is_log8 && !codec_spec(format.codec).expand) {
      encode_plain(format, x, *amax, codes);
    } else if (careful) {
      encode_finite<true>(format, x, *amax, *meta, noise, codes);
    } else {
      encode_finite<false>(format, x, *amax, *meta, noise, codes);
    }
    if (format.stochastic && !is_log8) dither_fp8(format, x, *amax, *meta, noise, codes);
  }
  if (x != given) {
    const uint8_t nan_code = format.codec == Codec::kLog8 ? 0 : kNanCode;
    for (int i = 0; i < n; ++i) {
      if (!is_finite(given[i])) codes[i] = nan_code;
    }
  }
}

}  // namespace coat::COAT_ISA
