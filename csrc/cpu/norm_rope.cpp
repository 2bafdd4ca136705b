// RMSNorm of heads with rotary embedding. Compiled once for each instruction set.
#include "norm_rope.h"

#include <cmath>

#include "rows.h"

namespace coat::COAT_ISA {
namespace {

// What is done to each pair (a, b) of a row: a' = aa a + ab b, b' = ba a + bb b. Arrays of row / 2.
struct Rotation {
  float *aa, *ab, *ba, *bb;
  explicit Rotation(float* memory, int64_t padded)
      : aa(memory), ab(memory + padded / 2), ba(memory + padded), bb(memory + padded + padded / 2) {}
  Rotation transposed() const {
    Rotation other = *this;
    other.ab = ba;
    other.ba = ab;
    return other;
  }
};
constexpr int kRotationMemory = 2;

// What changes from token to token: the weight and the rotation, read once for all heads of a token.
class Token {
 public:
  Token(const NormRopeShape& shape, float* memory)
      : shape_(shape),
        half_(shape.row / 2),
        padded_(padded_row(shape.row)),
        cos_(memory),
        sin_(memory + padded_),
        split_(memory + 2 * padded_),
        weights_{memory + 3 * padded_, memory + 4 * padded_},
        rotation(memory + 5 * padded_, padded_) {
    load_segment(shape.weight, 0, shape.row, weights_[0]);
    load_segment(shape.first_weight, 0, shape.row, weights_[1]);
  }

  // Whether row r starts another token.
  bool enter_row(int64_t r) {
    const int64_t token = r / shape_.heads;
    if (token == token_) return false;
    token_ = token;
    first = token % shape_.tokens < shape_.first_tokens;
    if (!rotates()) return true;
    load_segment(shape_.cos, token % shape_.table_tokens, shape_.row, cos_);
    load_segment(shape_.sin, token % shape_.table_tokens, shape_.row, sin_);
    for (int64_t i = 0; i < half_; ++i) {
      const int64_t a = shape_.interleaved ? 2 * i : i, b = shape_.interleaved ? 2 * i + 1 : half_ + i;
      rotation.aa[i] = cos_[a];
      rotation.ab[i] = -sin_[a];
      rotation.ba[i] = sin_[b];
      rotation.bb[i] = cos_[b];
    }
    return true;
  }
  bool rotates() const { return shape_.cos.data != nullptr; }
  const float* weight(bool of_first) const { return weights_[of_first ? 1 : 0]; }

  void rotate(const Rotation& m, float* __restrict x) const {
    const float* __restrict aa = m.aa;
    const float* __restrict ab = m.ab;
    const float* __restrict ba = m.ba;
    const float* __restrict bb = m.bb;
    if (shape_.interleaved) {
      for (int64_t i = 0; i < half_; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * aa[i] + b * ab[i];
        x[2 * i + 1] = a * ba[i] + b * bb[i];
      }
      return;
    }
    float* __restrict y = split_;
    for (int64_t i = 0; i < half_; ++i) {
      y[i] = x[i] * aa[i] + x[half_ + i] * ab[i];
      y[half_ + i] = x[i] * ba[i] + x[half_ + i] * bb[i];
    }
    memcpy(x, y, static_cast<size_t>(shape_.row) * sizeof(float));
  }

 private:
  const NormRopeShape& shape_;
  const int64_t half_, padded_;
  int64_t token_ = -1;
  float *const cos_, *const sin_, *const split_, *const weights_[2];

 public:
  const Rotation rotation;
  bool first = false;
};
constexpr int kTokenMemory = 5 + kRotationMemory;
static_assert(kTokenMemory + kRotationMemory + 4 == kNormRopeMemory);

COAT_SIMD_INLINE void load_head(const void* p, const NormRopeShape& shape, int64_t r, float* out) {
  const int64_t n = shape.row;
  load_floats(at(p, shape.dtype, r * n), shape.dtype, static_cast<int>(n), static_cast<int>(padded_row(n)), out);
}

COAT_SIMD_INLINE void store_head(const float* x, const NormRopeShape& shape, int64_t r, void* p) {
  store_floats(x, static_cast<int>(shape.row), shape.dtype, at(p, shape.dtype, r * shape.row));
}

void invert(const Rotation& m, int64_t half, const Rotation& out) {
  for (int64_t i = 0; i < half; ++i) {
    const float determinant = m.aa[i] * m.bb[i] - m.ab[i] * m.ba[i];
    const float inverse = determinant == 0.0f ? 0.0f : 1.0f / determinant;  // tables of zeros: padding, which has no gradient
    out.aa[i] = m.bb[i] * inverse;
    out.ab[i] = -m.ab[i] * inverse;
    out.ba[i] = -m.ba[i] * inverse;
    out.bb[i] = m.aa[i] * inverse;
  }
}

}  // namespace

void norm_rope(const NormRopeJob& job, float* memory, int64_t begin, int64_t end) {
  const int64_t n = job.shape.row, padded = padded_row(n);
  float* const x = memory + kTokenMemory * padded;
  Token token(job.shape, memory);
  for (int64_t r = begin; r < end; ++r) {
    token.enter_row(r);
    load_head(job.x, job.shape, r, x);
    const F squares = sum_vectors(padded, [&](int64_t i) COAT_LAMBDA_INLINE { return mul(load(x + i), load(x + i)); });
    const float rstd = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + job.eps);
    job.rstd[r] = rstd;
    const float* const weight = token.weight(token.first);
    for (int64_t i = 0; i < padded; i += kLanes) store(x + i, mul(mul(load(x + i), set1(rstd)), load(weight + i)));
    if (token.rotates()) token.rotate(token.rotation, x);
    store_head(x, job.shape, r, job.y);
  }
}

// n = y rotated back, h = n / weight; dx = (g · weight - h · mean(g · n)) · rstd with g = dy rotated back by the transpose.
void norm_rope_backward(const NormRopeBackwardJob& job, float* memory, int64_t begin, int64_t end, float* dweight, float* dfirst_weight) {
  const int64_t n = job.shape.row, padded = padded_row(n);
  Token token(job.shape, memory);
  memory += kTokenMemory * padded;
  const Rotation inverse(memory, padded), transposed = token.rotation.transposed();
  memory += kRotationMemory * padded;
  float *const normed = memory, *const grad = memory + padded;
  float* const inverse_weights[2] = {memory + 2 * padded, memory + 3 * padded};
  for (int k = 0; k < 2; ++k) {
    if (k == 1 && job.shape.first_weight.data == nullptr) break;
    for (int64_t i = 0; i < padded; ++i) {
      const float weight = token.weight(k == 1)[i];
      inverse_weights[k][i] = weight == 0 ? 0.0f : 1.0f / weight;
    }
  }
  for (int64_t r = begin; r < end; ++r) {
    if (token.enter_row(r) && token.rotates()) invert(token.rotation, n / 2, inverse);
    load_head(job.y, job.shape, r, normed);
    load_head(job.dy, job.shape, r, grad);
    if (token.rotates()) {
      token.rotate(inverse, normed);
      token.rotate(transposed, grad);
    }
    const float *const weight = token.weight(token.first), *const inverse_weight = inverse_weights[token.first ? 1 : 0];
    float* const products = token.first ? dfirst_weight : dweight;
    if (products != nullptr) {
      for (int64_t i = 0; i < padded; i += kLanes) {
        const F h = mul(load(normed + i), load(inverse_weight + i));
        store(products + i, fma(load(grad + i), h, load(products + i)));
      }
    }
    if (job.dx == nullptr) continue;
    const F along = sum_vectors(padded, [&](int64_t i) COAT_LAMBDA_INLINE { return mul(load(grad + i), load(normed + i)); });
    const F slope = set1(sum(along) / static_cast<float>(n)), rstd = set1(job.rstd[r]);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const F h = mul(load(normed + i), load(inverse_weight + i));
      store(grad + i, mul(fnma(h, slope, mul(load(grad + i), load(weight + i))), rstd));
    }
    store_head(grad, job.shape, r, job.dx);
  }
}

}  // namespace coat::COAT_ISA
