// The exponential, and with it GELU and SiLU and their slopes: coat_kernels/ops/activation/reference.py has the formulas.
//
// All three functions are x s(z(x)) with s(z) = 1 / (1 + exp(-z)). For the exact GELU, whose s is the normal distribution Phi, z is the
// logarithm of Phi's odds: x times a polynomial of x^2. Unlike a polynomial of Phi it goes to 0 and 1 by itself and keeps digits in the
// lower tail. Errors against float64, over a grid of 4 million floats in [-20, 20] and to +-1e30: f is off by 4.5e-7 |x| and f' by 1.5e-6
// with gelu, where it is the fits' error, and by 1.5e-7 |x| and 2.2e-7 with the others.
#pragma once

#include "activation.h"
#include "simd.h"

namespace coat::COAT_ISA {

// Value of the polynomial c[0] + c[1] t + ...
template <int n>
COAT_SIMD_INLINE F polynomial(const float (&c)[n], F t) {
  F sum = set1(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) sum = fma(sum, t, set1(c[i]));
  return sum;
}

// 2^p, relative error 1.7e-7; 0 and inf far out, exactly. NaN stays NaN.
COAT_SIMD_INLINE F exp2(F p) {
#if defined(COAT_ISA_AVX512)
  // minimax on [0, 1), own fit: 7.5e-8
  constexpr float kPower[] = {0.9999999403953552f,  0.6931530833244324f,  0.24015361070632935f,
                              0.05582631751894951f, 0.00898933969438076f, 0.0018775766948238015f};
  const F rest = _mm512_reduce_ps(p, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(kPower, rest), p);  // times 2^floor(p)
#else
  // minimax on [-1/2, 1/2] with the value 1 at 0, own fit: 9.1e-8
  constexpr float kPower[] = {
      1.0f, 0.6931470036506653f, 0.24022242426872253f, 0.05550733581185341f, 0.009671512991189957f, 0.001326472731307149f};
  constexpr float kMagic = 12582912.0f;          // 1.5 * 2^23: the sum's low bits are p, rounded
  p = min(set1(128.0f), max(set1(-127.0f), p));  // of two operands the second is returned if one is NaN
  const F shifted = add(p, set1(kMagic)), rest = sub(p, sub(shifted, set1(kMagic)));
  return as_float(add(as_int(polynomial(kPower, rest)), shl<23>(as_int(shifted))));
#endif
}

// -log2(e) z(x); t = x^2.
template <Activation kind>
COAT_SIMD_INLINE F negative_logit(F x, F t) {
  if (kind == Activation::kSilu) return mul(x, set1(-1.44269504f));
  if (kind == Activation::kGeluTanh) return mul(x, fma(t, set1(-0.102943242f), set1(-2.30220819f)));  // 2 sqrt(2 / pi) (0.044715 t + 1)
  // minimax of the odds' logarithm over x, own fit on |x| <= 6 with weights max(Phi (1 - Phi), 1e-5) x: 4.0e-7 in Phi, 3 % of Phi at -6
  constexpr float kOdds[] = {-2.302199125289917f,     -0.10487488657236099f,  0.00013197999214753509f, 0.00014619779540225863f,
                             -9.456181942368858e-06f, 2.603019026992115e-07f, -2.6482906978486653e-09f};
  return mul(x, polynomial(kOdds, t));
}

// f(x). NaN stays NaN; -inf gives NaN, as in torch.
template <Activation kind>
COAT_SIMD_INLINE F activation_value(F x) {
  return mul(x, reciprocal(add(set1(1.0f), exp2(negative_logit<kind>(x, mul(x, x))))));
}

// f'(x); the slope at NaN and +-inf is NaN. *value: f(x).
template <Activation kind>
COAT_SIMD_INLINE F activation_slope(F x, F* value) {
  const F t = mul(x, x), e = exp2(negative_logit<kind>(x, t)), s = reciprocal(add(set1(1.0f), e));
  *value = mul(x, s);
  // 1 - s = e s; where e is inf, s is 0 and its product with any number right
  const F rest = mul(*value, mul(min(set1(3.40282347e38f), e), s));
  if (kind == Activation::kSilu) return add(s, rest);
  const F bounded = min(set1(1e6f), t);  // far beyond where rest is 0, so that no inf meets it
  if (kind == Activation::kGeluTanh) return fma(rest, fma(bounded, set1(0.214064448f), set1(1.59576912f)), s);
  // phi / (s (1 - s)) with the s above, own fit: 9.6e-7 in f'
  constexpr float kSlope[] = {1.5957480669021606f,  0.21809552609920502f,    -0.0004258745757397264f, -0.0007386816432699561f,
                              6.6590124333743e-05f, -2.709689397306647e-06f, 4.5954216432164685e-08f};
  return fma(rest, polynomial(kSlope, bounded), s);
}

}  // namespace coat::COAT_ISA
