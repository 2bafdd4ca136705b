// Y = slope * log2|x| + offset in fixed point: what all logarithm-based codes are read from.
#pragma once

#include "simd.h"

namespace coat::COAT_ISA {

// Minimax polynomials of log2 on [1, 2), own fits. Degree 5 in m: error 1.25e-5; at k = 3 that moves 0.02 % of e4m3 codes.
constexpr int kFastDegree = 5;
constexpr float kFastLog2[8] = {-2.80036402f, 5.09171104f, -3.55079293f, 1.63114882f, -0.416563690f, 0.0448736101f, 0.0f, 0.0f};
// Degree 7 in m - 1: error 2.8e-7.
constexpr int kCarefulDegree = 7;
constexpr float kCarefulLog2[8] = {2.77289502e-7f, 1.44265628f,  -0.720453024f,  0.472897917f,
                                   -0.324253917f,  0.192089543f, -0.0780621246f, 0.0151253594f};

// A group's polynomial, times its slope, kFixedMagic added: c[i * stride] is the coefficient of m^i, kSlope that of the exponent.
struct Coefficients {
  const float* c;
  int stride;
};
constexpr int kSlope = 8, kNumCoefficients = 9;

template <bool kCareful>
COAT_SIMD_INLINE F fixed_log2(const Coefficients& k, F x) {
  const auto c = [&](int i) __attribute__((always_inline)) { return set1(k.c[i * k.stride]); };
  F exponent, m;
  if (kCareful) {
    split_any(x, &exponent, &m);
    m = sub(m, set1(1.0f));
  } else {
    split_normal(x, &exponent, &m);
  }
  constexpr int degree = kCareful ? kCarefulDegree : kFastDegree;
  F sum = c(degree);
  for (int i = degree - 1; i >= 0; --i) sum = fma(sum, m, c(i));
  return fma(exponent, c(kSlope), sum);
}

// One group's coefficients (stride 1) of the careful polynomial, with Y(amax) = target.
static inline void careful_coefficients(float slope, float target, float amax, float out[kNumCoefficients]) {
  int exponent = -127;
  if (amax < bits_float(kMinNormalBits)) {
    amax *= 33554432.0f;  // 2^25
    exponent -= 25;
  }
  const uint32_t bits = float_bits(amax);
  exponent += static_cast<int>(bits >> 23);
  const double m = bits_float((bits & 0x007FFFFF) | 0x3F800000) - 1.0;
  double log2_amax = kCarefulLog2[kCarefulDegree];
  for (int i = kCarefulDegree - 1; i > 0; --i) log2_amax = log2_amax * m + kCarefulLog2[i];
  // the constant term cancels: it is in log2|x| and in log2 amax
  const double offset = static_cast<double>(kFixedMagic) + target - static_cast<double>(slope) * (exponent + log2_amax * m);
  out[0] = static_cast<float>(offset);
  for (int i = 1; i <= kCarefulDegree; ++i) out[i] = slope * kCarefulLog2[i];
  out[kSlope] = slope;
}

}  // namespace coat::COAT_ISA
