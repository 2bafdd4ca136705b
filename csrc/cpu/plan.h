// The metadata and coefficients of a block's groups, a vector of groups at a time: computed group by group they took a
// quarter of the step.
#pragma once

#include "log2.h"

namespace coat::COAT_ISA {

constexpr int kMaxGroups = kBlock / kMinGroup;

struct GroupStats {
  uint32_t max_bits, min_bits;  // of |x|; zeros and NaN count
};

struct alignas(64) Plan {
  uint32_t max_bits[kMaxGroups], min_bits[kMaxGroups];  // set by whoever has seen the values
  uint32_t meta[kMaxGroups];
  uint32_t fast[kMaxGroups];  // not 0: the group needs nothing careful, and the coefficients hold
  float c[kNumCoefficients][kMaxGroups];
};

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

// k16 of a spread. The float quotient is exact enough: range_q15 < 2^24, so no quotient rounds up to an integer.
COAT_SIMD_INLINE I expanded_meta(I spread, int range_q15) {
  const F octaves_q15 = max(to_float(shr<8>(spread)), set1(1.0f));
  const F quotient = div(set1(static_cast<float>(range_q15)), octaves_q15);
  return truncate(min(max(quotient, set1(1.0f)), set1(255.0f)));
}

// j of a spread: ceil(125 s / 260096), clamped, by an estimate at most two below and integer comparisons.
COAT_SIMD_INLINE I log8_meta(I spread) {
  const I octaves_q11 = add(shr<12>(spread), set1(kLog2SlackQ11));
  const I wanted = mul(octaves_q11, set1(125)), step = set1(260096);
  I j = truncate(max(sub(mul(to_float(octaves_q11), set1(125.0f / 260096.0f)), set1(0.5f)), set1(0.0f)));
  for (int i = 0; i < 2; ++i) j = add(j, select(less(mul(j, step), wanted), set1(1), set1(0)));
  return umin(umax(j, set1(1)), set1(255));
}

// softsign8: the sums and products of its encoder stay in float32's normal range between these maxima.
constexpr int32_t kSoftsignMinBits = (127 - 100) << 23, kSoftsignMaxBits = (127 + 100) << 23;

static inline void plan_softsign(int groups, Plan* plan) {
  for (int g = 0; g < groups; g += kLanes) {
    const I max_bits = load(plan->max_bits + g);
    const I not_small = select(less(max_bits, set1(kSoftsignMinBits)), set1(0), set1(1));
    store(plan->fast + g, zero_where(less(set1(kSoftsignMaxBits), max_bits), not_small));
    store(plan->meta + g, set1(kUnitMeta));
  }
}

// Fills meta, fast and the coefficients of the first `groups` groups.
static inline void make_plan(const GroupFormat& format, int groups, Plan* plan) {
  if (format.codec == Codec::kSoftsign8) return plan_softsign(groups, plan);
  const bool log8 = format.codec == Codec::kLog8;
  constexpr float one = 1 << kFraction;
  for (int g = 0; g < groups; g += kLanes) {
    const I max_bits = load(plan->max_bits + g), min_bits = load(plan->min_bits + g);
    const I spread = sub(max_bits, min_bits);
    const I meta = log8 ? log8_meta(spread) : format.expand ? expanded_meta(spread, format.range_q15) : set1(kUnitMeta);
    F slope, target;
    I ordinary = select(less(min_bits, set1(static_cast<int32_t>(kMinNormalBits))), set1(0), set1(1));
    ordinary = zero_where(less(set1(static_cast<int32_t>(kInfBits) - 1), max_bits), ordinary);
    if (log8) {
      slope = div(set1(250 * one), to_float(meta));
      target = set1(255 * one);
      // under j = 4 the fast polynomial's error nears the allowed number of codes; at 255 codes may have to be clamped
      ordinary = zero_where(less(meta, set1(4)), zero_where(less(set1(254), meta), ordinary));
    } else {
      slope = mul(to_float(meta), set1(format.buckets->buckets_per_octave * (one / 16)));
      target = set1(format.buckets->top);
      ordinary = zero_where(less(set1((kMaxOctaves << 23) - 1), spread), ordinary);
    }
    F exponent, m;
    split_normal(as_float(max_bits), &exponent, &m);
    F log2_amax = set1(kFastLog2[kFastDegree]);
    for (int i = kFastDegree - 1; i > 0; --i) log2_amax = fma(log2_amax, m, set1(kFastLog2[i]));
    // the constant term cancels: it is in log2|x| and in log2 amax
    const F offset = fnma(slope, exponent, add(target, set1(kFixedMagic)));
    store(plan->c[0] + g, fnma(slope, mul(log2_amax, m), offset));
    for (int i = 1; i <= kFastDegree; ++i) store(plan->c[i] + g, mul(slope, set1(kFastLog2[i])));
    store(plan->c[kSlope] + g, slope);
    store(plan->meta + g, meta);
    store(plan->fast + g, ordinary);
  }
}

}  // namespace coat::COAT_ISA
