// float32 to codes, a block of groups at a time.
//
// The logarithm-based codes need no exp2: Y comes out of one polynomial in fixed point (log2.h), and an integer addition
// from a table rounds it (tables.h). Groups with zeros, subnormals, extreme ranges or non-finite values take the careful
// variant of the same kernel.
#pragma once

#include "noise.h"
#include "plan.h"

namespace coat::COAT_ISA {

// Memory that is read after this encode, bytes_per_group for each group: encoding itself reads none outside L1. Brought to
// L2 it saves 3 % of a step on arrays in DRAM; to L1 it costs as much, for the line buffers it holds.
struct Upcoming {
  const char* address;
  int bytes_per_group;
};

COAT_SIMD_INLINE void prefetch(const Upcoming& upcoming, int group) {
  const char* const from = upcoming.address + static_cast<int64_t>(group) * upcoming.bytes_per_group;
  for (int i = 0; i < upcoming.bytes_per_group; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Where the groups of one array go, and what stochastic rounding needs.
struct Destination {
  uint8_t* codes;
  float* amax;
  uint8_t* meta;
  int stride;     // between groups, of amax and meta
  uint32_t key;   // of the generator
  int64_t first;  // index of the first element in its tensor
  Upcoming upcoming[2];
};

// 256 times the random number in (0, 1) of the elements whose noise this is.
COAT_SIMD_INLINE F draw(const uint8_t* noise) { return sub(set1(255.5f), to_float(load_u8(noise))); }

COAT_SIMD_INLINE M is_zero(F x) { return no_bits(as_int(x), set1(static_cast<int32_t>(kAbsMask))); }

template <bool kCareful, bool kSigned>
COAT_SIMD_INLINE void encode_expanded(const Coefficients& k, const BucketTable& table, const float* x, int n, uint8_t* codes) {
  const Table32 low = load32(table.low);
  const Table16 normal = load16(table.normal);
  const I low_last = set1(table.low_end - 1);
  store_codes(codes, n, [&](int i) __attribute__((always_inline)) {
    const F value = load(x + i);
    F y = fixed_log2<kCareful>(k, value);
    if (kCareful) y = max(y, set1(table.lowest));
    const I bits = as_int(y), bucket = shr<kFraction>(bits);
    const I entry = lookup_where(less(low_last, bits), normal, bucket, lookup(low, bucket));
    I code = shr<kFraction>(add(bits, entry));
    if (kSigned) code = insert_sign(code, value);
    return kCareful ? zero_where(is_zero(value), code) : code;
  });
}

// noise: 255 - the random byte of each element, where stochastic.
template <bool kCareful, bool kStochastic>
COAT_SIMD_INLINE void encode_log8(const Coefficients& k, const DitherTable& dither, const float* x, int n, const uint8_t* noise,
                                  uint8_t* codes) {
  const Table32 entries = load32(dither.entry);
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
    return kCareful ? zero_where(is_zero(value), code) : code;
  });
}

// Every magnitude of x stays in float32's normal range beside amax. noise as for log8.
template <bool kKeep, bool kStochastic>
COAT_SIMD_INLINE void encode_softsign8(float amax, const float* x, int n, const uint8_t* noise, uint8_t* codes) {
  const F top = set1(amax), odds_unit = set1(256.0f / 254.0f / amax);
  const I byte = set1(0xFF);
  const F magic = set1(1.5f * kFixedMagic);  // adding it leaves a signed integer, rounded to even, in the low byte
  store_codes(codes, n, [&](int i) __attribute__((always_inline)) {
    const F value = load(x + i), magnitude = abs(value), sum = add(magnitude, top);
    if (!kKeep && !kStochastic) return and_(as_int(add(div(mul(value, set1(254.0f)), sum), magic)), byte);
    const F y = div(mul(magnitude, set1(254.0f)), sum);
    I code;
    if (kStochastic) {
      code = truncate(y);
      const F below = to_float(code);
      const F odds = mul(mul(sub(y, below), sub(set1(253.0f), below)), mul(sum, odds_unit));  // of 256
      code = add(code, select(less(draw(noise + i), odds), set1(1), set1(0)));
    } else {
      code = and_(as_int(add(y, magic)), byte);
    }
    if (kKeep) code = zero_where(is_zero(value), umax(code, set1(1)));
    const I sign = shr<31>(as_int(value));
    return and_(add(xor_(code, sub(set1(0), sign)), sign), byte);
  });
}

// encode_softsign8 as the format asks for it.
static inline void encode_softsign8(const GroupFormat& format, float amax, const float* x, const uint8_t* noise, uint8_t* codes) {
  const int n = format.group_size;
  if (format.keep_nonzero) {
    format.stochastic ? encode_softsign8<true, true>(amax, x, n, noise, codes) : encode_softsign8<true, false>(amax, x, n, noise, codes);
  } else {
    format.stochastic ? encode_softsign8<false, true>(amax, x, n, noise, codes) : encode_softsign8<false, false>(amax, x, n, noise, codes);
  }
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
    const I flushed = zero_where(is_zero(value), code);
    return zero_where(no_bits(flushed, set1(0x7F)), insert_sign(flushed, value));
  });
}

// Replaces nearest codes of small floats by stochastic ones.
static inline void dither_float(const GroupFormat& format, const float* x, float amax, uint8_t meta, const uint8_t* noise, uint8_t* codes) {
  float values[128];
  for (int code = 0; code < 128; ++code) values[code] = decode_exact(format.codec, amax, meta, static_cast<uint8_t>(code));
  for (int i = 0; i < format.group_size; ++i) {
    if (!is_finite(x[i])) continue;
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

// dither_float for e2m1, whose few values are looked up. The smallest is at least kMinLookedUp: then 256 over a step is finite.
constexpr float kMinLookedUp = 7.8886091e-31f;  // 2^-100

static inline void dither_e2m1(const GroupFormat& format, const float* x, float amax, uint8_t meta, const uint8_t* noise, uint8_t* codes) {
  alignas(64) float values[16] = {}, per_step[16] = {};
  for (int code = 0; code <= format.max_code; ++code) values[code] = format.decode[meta].low[code] * amax;
  for (int code = 0; code < format.max_code; ++code) per_step[code] = 256.0f / (values[code + 1] - values[code]);
  const Table16 value_of = load16(values), per_step_of = load16(per_step);
  const I keep = set1(format.keep_nonzero ? 1 : 0);
  store_codes(codes, format.group_size, [&](int i) __attribute__((always_inline)) {
    const F value = load(x + i), magnitude = abs(value);
    const I nearest = and_(load_u8(codes + i), set1(7));
    const I below = sub(nearest, select(less(magnitude, as_float(lookup(value_of, nearest))), set1(1), set1(0)));
    const F odds = mul(sub(magnitude, as_float(lookup(value_of, below))), as_float(lookup(per_step_of, below)));
    I code = umax(add(below, select(less(draw(noise + i), odds), set1(1), set1(0))), keep);
    code = zero_where(is_zero(value), zero_where(less(set1(static_cast<int32_t>(kInfBits) - 1), as_int(magnitude)), code));
    return zero_where(no_bits(code, set1(7)), insert_sign(code, value));
  });
}

// 255 - the random byte of elements first .. first + n - 1; both are multiples of 32, as groups are.
static inline void fill_noise(uint32_t key, int64_t first, int n, uint8_t* noise) {
  random_words(key, static_cast<uint32_t>(first >> 2), n / 4, [&](int i, I random) __attribute__((always_inline)) {
    uint32_t words[kLanes];
    store(words, xor_(random, set1(-1)));
    memcpy(noise + 4 * i, words, sizeof words);
  });
}

static inline uint32_t smallest_nonzero(const float* x, int n) {
  const I one = set1(1);
  I lowest = set1(-1);  // of bits - 1, so that 0 is the largest
  for (int i = 0; i < n; i += kLanes) lowest = umin(lowest, sub(as_int(abs(load(x + i))), one));
  uint32_t out[4];
  reduce(lowest, lowest, lowest, lowest, out);
  return out[2] + 1;
}

// One group of any finite or non-finite values, nearest for small floats.
static inline void encode_carefully(const GroupFormat& format, const float* x, GroupStats stats, const uint8_t* noise, uint8_t* codes,
                                    float* amax, uint8_t* meta) {
  const int n = format.group_size;
  const float* const given = x;
  float finite[kMaxGroup];
  if (stats.max_bits >= kInfBits) {
    for (int i = 0; i < n; ++i) finite[i] = is_finite(x[i]) ? x[i] : 0.0f;
    x = finite;
    stats = group_stats(x, n);
  }
  if (stats.max_bits > 0) stats.min_bits = smallest_nonzero(x, n);
  *amax = bits_float(stats.max_bits);
  *meta = group_meta(format.codec, stats.max_bits, stats.min_bits);
  float c[kNumCoefficients];
  constexpr float one = 1 << kFraction;
  if (stats.max_bits == 0) {
    memset(codes, 0, static_cast<size_t>(n));
  } else if (format.codec == Codec::kSoftsign8) {
    const double top = *amax;
    for (int i = 0; i < n; ++i) finite[i] = static_cast<float>(x[i] / top);
    encode_softsign8(format, 1.0f, finite, noise, codes);
  } else if (format.codec == Codec::kLog8) {
    careful_coefficients(250 * one / static_cast<float>(*meta), 255 * one, *amax, c);
    if (format.stochastic) {
      encode_log8<true, true>({c, 1}, format.dither[*meta], x, n, noise, codes);
    } else {
      encode_log8<true, false>({c, 1}, format.dither[*meta], x, n, noise, codes);
    }
  } else if (format.expand) {
    careful_coefficients(format.buckets->buckets_per_octave * (one / 16) * static_cast<float>(*meta), format.buckets->top, *amax, c);
    encode_expanded<true, true>({c, 1}, *format.buckets, x, n, codes);
  } else {
    encode_plain(format, x, *amax, codes);
  }
  if (x == given) return;
  for (int i = 0; i < n; ++i) {
    if (!is_finite(given[i])) codes[i] = format.nan_code;
  }
}

// Encodes `groups` groups of x by `encode(group, x, codes, noise)`, or carefully where the plan says so.
template <typename Encode>
COAT_SIMD_INLINE void encode_each(const GroupFormat& format, const Plan& plan, const float* x, int groups, const Destination& to,
                                  const uint8_t* noise, Encode encode) {
  const int n = format.group_size;
  for (int g = 0; g < groups; ++g) {
    prefetch(to.upcoming[0], g);
    prefetch(to.upcoming[1], g);
    float* const amax = to.amax + g * to.stride;
    uint8_t* const meta = to.meta + g * to.stride;
    if (plan.fast[g] != 0) {
      *amax = bits_float(plan.max_bits[g]);
      *meta = static_cast<uint8_t>(plan.meta[g]);
      encode(g, x + g * n, to.codes + g * n, noise + g * n);
    } else {
      encode_carefully(format, x + g * n, {plan.max_bits[g], plan.min_bits[g]}, noise + g * n, to.codes + g * n, amax, meta);
    }
  }
}

// Writes the codes, amax and metadata bytes of `groups` groups, at most kMaxGroups. plan holds the max_bits and min_bits of x.
static inline void encode_groups(const GroupFormat& format, Plan* plan, const float* x, int groups, const Destination& to) {
  make_plan(format, groups, plan);
  const int n = format.group_size;
  alignas(64) uint8_t noise[kBlock];
  if (format.stochastic) fill_noise(to.key, to.first, groups * n, noise);
  const auto coefficients = [&](int g) __attribute__((always_inline)) { return Coefficients{plan->c[0] + g, kMaxGroups}; };
  const auto run = [&](auto encode) __attribute__((always_inline)) { encode_each(format, *plan, x, groups, to, noise, encode); };
  if (format.codec == Codec::kLog8 && format.stochastic) {
    run([&](int g, const float* values, uint8_t* codes, const uint8_t* random) __attribute__((always_inline)) {
      encode_log8<false, true>(coefficients(g), format.dither[plan->meta[g]], values, n, random, codes);
    });
  } else if (format.codec == Codec::kLog8) {
    run([&](int g, const float* values, uint8_t* codes, const uint8_t* random) __attribute__((always_inline)) {
      encode_log8<false, false>(coefficients(g), format.dither[plan->meta[g]], values, n, random, codes);
    });
  } else if (format.codec == Codec::kSoftsign8) {
    run([&](int g, const float* values, uint8_t* codes, const uint8_t* random) {
      encode_softsign8(format, bits_float(plan->max_bits[g]), values, random, codes);
    });
  } else if (!format.expand) {
    run([&](int g, const float* values, uint8_t* codes, const uint8_t*) {
      encode_plain(format, values, bits_float(plan->max_bits[g]), codes);
    });
  } else if (format.has_signs) {
    run([&](int g, const float* values, uint8_t* codes, const uint8_t*)
            __attribute__((always_inline)) { encode_expanded<false, true>(coefficients(g), *format.buckets, values, n, codes); });
  } else {
    run([&](int g, const float* values, uint8_t* codes, const uint8_t*)
            __attribute__((always_inline)) { encode_expanded<false, false>(coefficients(g), *format.buckets, values, n, codes); });
  }
  if (!format.stochastic || !is_small_float(format.codec)) return;
  for (int g = 0; g < groups; ++g) {
    const float amax = to.amax[g * to.stride];
    const uint8_t meta = to.meta[g * to.stride];
    if (amax == 0) continue;
    const bool looked_up = format.packed && amax * format.decode[meta].low[1] >= kMinLookedUp;
    (looked_up ? dither_e2m1 : dither_float)(format, x + g * n, amax, meta, noise + g * n, to.codes + g * n);
  }
}

}  // namespace coat::COAT_ISA
