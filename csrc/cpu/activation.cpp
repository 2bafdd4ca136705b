// Activation functions, their 8-bit copies and their gradients. Compiled once for each instruction set.
#include "convert.h"
#include "scaled8.h"
#include "special.h"

namespace coat::COAT_ISA {
namespace {

// Elements [first, first + count) of a row, at most kBlock of them, from a group's border on.
struct Piece {
  int64_t row, first;
  int count, padded;  // padded: to whole vectors

  int64_t at(int64_t stride) const { return row * stride + first; }
  int64_t group(const ActivationJob& job) const {
    return row * ((job.width + job.format.group_size - 1) / job.format.group_size) + first / job.format.group_size;
  }
};

// The piece's floats, zeros up to `padded`. Values are encoded on the way where the job has a place for codes.
COAT_SIMD_INLINE void load_operand(const ActivationJob& job, const ActivationOperand& operand, const Piece& piece, float* x) {
  uint8_t* const codes = operand.codes == nullptr ? nullptr : operand.codes + piece.at(job.width);
  if (operand.values != nullptr) {
    load_floats(at(operand.values, job.value_dtype, piece.at(operand.stride)), job.value_dtype, piece.count, piece.padded, x);
    if (codes != nullptr) encode_row(job.format, x, piece.count, codes, operand.scale + piece.group(job));
  } else {
    decode_row(job.format, codes, operand.scale + piece.group(job), piece.count, x);
    for (int i = piece.count; i < piece.padded; ++i) x[i] = 0.0f;
  }
}

// Largest finite magnitudes of the groups of y as it was stored.
static inline void store_amax(const ActivationJob& job, const Piece& piece, float* y) {
  if (job.dtype != DType::kFloat32) load_floats(at(job.out, job.dtype, piece.at(job.width)), job.dtype, piece.count, piece.padded, y);
  float* amax = job.out_amax + piece.group(job);
  for (int begin = 0; begin < piece.count; begin += job.format.group_size) {
    const int left = piece.padded - begin, n = left < job.format.group_size ? left : job.format.group_size;
    const uint32_t top = largest_bits(y + begin, n);
    *amax++ = bits_float(top < kInfBits ? top : largest_finite_bits(y + begin, n));
  }
}

template <Activation kind, bool kGated>
void forward(const ActivationJob& job, const Piece& piece) {
  alignas(64) float gate[kBlock], up[kBlock];
  load_operand(job, job.gate, piece, gate);
  if (kGated) load_operand(job, job.up, piece, up);
  for (int i = 0; i < piece.padded; i += kLanes) {
    const F y = activation_value<kind>(load(gate + i));
    store(gate + i, kGated ? mul(y, load(up + i)) : y);
  }
  store_floats(gate, piece.count, job.dtype, at(job.out, job.dtype, piece.at(job.width)));
  if (job.out_amax != nullptr) store_amax(job, piece, gate);
}

template <Activation kind, bool kGated>
void backward(const ActivationJob& job, const Piece& piece) {
  alignas(64) float gate[kBlock], up[kBlock], dy[kBlock];
  load_operand(job, job.gate, piece, gate);
  if (kGated) load_operand(job, job.up, piece, up);
  load_floats(at(job.dy, job.dtype, piece.at(job.width)), job.dtype, piece.count, piece.padded, dy);
  for (int i = 0; i < piece.padded; i += kLanes) {
    F value;
    const F slope = activation_slope<kind>(load(gate + i), &value), d = load(dy + i);
    store(gate + i, mul(kGated ? mul(d, load(up + i)) : d, slope));
    if (kGated) store(up + i, mul(d, value));
  }
  if (!kGated) return store_floats(gate, piece.count, job.dtype, at(job.out, job.dtype, piece.at(job.width)));
  const int64_t first = piece.at(2 * job.width), second = first + job.width;
  store_floats(gate, piece.count, job.dtype, at(job.out, job.dtype, job.gate_first ? first : second));
  store_floats(up, piece.count, job.dtype, at(job.out, job.dtype, job.gate_first ? second : first));
}

using Run = void (*)(const ActivationJob&, const Piece&);

template <Activation kind>
Run choose(const ActivationJob& job) {
  if (job.dy == nullptr) return job.gated() ? forward<kind, true> : forward<kind, false>;
  return job.gated() ? backward<kind, true> : backward<kind, false>;
}

}  // namespace

void activation(const ActivationJob& job, int64_t begin, int64_t end) {
  const Run run = job.kind == Activation::kSilu   ? choose<Activation::kSilu>(job)
                  : job.kind == Activation::kGelu ? choose<Activation::kGelu>(job)
                                                  : choose<Activation::kGeluTanh>(job);
  const int64_t pieces = (job.width + kBlock - 1) / kBlock;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i % pieces * kBlock, left = job.width - first;
    const int count = static_cast<int>(left < kBlock ? left : kBlock);
    run(job, {i / pieces, first, count, (count + kLanes - 1) / kLanes * kLanes});
  }
}

}  // namespace coat::COAT_ISA
