// Activation functions, their 8-bit copies and their gradients. Compiled once for each instruction set.
#include "convert.h"
#include "scaled8.h"
#include "special.h"

namespace coat::COAT_ISA {
namespace {

// Elements [first, first + count) of a row, at most kBlock of them, from a group's border on.
struct Piece {
  int64_t row, first;
  int count;

  int64_t at(int64_t stride) const { return row * stride + first; }
  int64_t group(const ActivationJob& job) const {
    return row * ((job.width + job.format.group_size - 1) / job.format.group_size) + first / job.format.group_size;
  }
};

// An array that holds the piece, at its first element.
struct Source {
  const void* begin;
  DType dtype;
};

// Vector i of the piece, or what it has of it and zeros. The dtype is asked for each vector: the branch costs nothing beside the
// arithmetic.
COAT_SIMD_INLINE F load_part(const Source& source, int i, int count) {
  alignas(64) float staged[kLanes];
  if (i + kLanes > count) {
    load_floats(at(source.begin, source.dtype, i), source.dtype, count - i, kLanes, staged);
    return load(staged);
  }
  if (source.dtype == DType::kFloat32) return load(static_cast<const float*>(source.begin) + i);
  const uint16_t* const half = static_cast<const uint16_t*>(source.begin) + i;
  return source.dtype == DType::kBFloat16 ? load_bf16(half) : load_f16(half);
}

COAT_SIMD_INLINE void store_part(void* out, DType dtype, int i, int count, F x) {
  if (i + kLanes <= count && dtype == DType::kFloat32) return store(static_cast<float*>(out) + i, x);
  alignas(64) float staged[kLanes];
  store(staged, x);
  store_floats(staged, count - i < kLanes ? count - i : kLanes, dtype, at(out, dtype, i));
}

// outs[k][i] = results[k] of compute(i, results), for all vectors of the piece. Two at a time: AVX-512 then narrows both to bfloat16 in one
// go.
template <int n, typename Compute>
COAT_SIMD_INLINE void produce(void* const (&outs)[n], DType dtype, int count, Compute compute) {
  F first[n], second[n];
  int i = 0;
  for (; i + 2 * kLanes <= count && dtype == DType::kBFloat16; i += 2 * kLanes) {
    compute(i, first);
    compute(i + kLanes, second);
    for (int k = 0; k < n; ++k) store_bf16(static_cast<uint16_t*>(outs[k]) + i, first[k], second[k]);
  }
  for (; i < count; i += kLanes) {
    compute(i, first);
    for (int k = 0; k < n; ++k) store_part(outs[k], dtype, i, count, first[k]);
  }
}

// Where to read an operand: its values where they lie, or its codes' values, decoded into `buffer`.
COAT_SIMD_INLINE Source open_operand(const ActivationJob& job, const ActivationOperand& operand, const Piece& piece, float* buffer) {
  if (operand.values != nullptr) return {at(operand.values, job.value_dtype, piece.at(operand.stride)), job.value_dtype};
  decode_row(job.format, operand.codes + piece.at(job.width), operand.scale + piece.group(job), piece.count, buffer);
  return {buffer, DType::kFloat32};
}

// Writes the codes that the job has a place for; `buffer` holds the operand's values if they are not float32 where they lie.
COAT_SIMD_INLINE void encode_operand(const ActivationJob& job, const ActivationOperand& operand, const Piece& piece, const Source& source,
                                     const float* buffer) {
  if (operand.values == nullptr || operand.codes == nullptr) return;
  const float* const x = source.dtype == DType::kFloat32 ? static_cast<const float*>(source.begin) : buffer;
  encode_row(job.format, x, piece.count, operand.codes + piece.at(job.width), operand.scale + piece.group(job));
}

// Largest finite magnitudes of the groups of y as it was stored.
static inline void store_amax(const ActivationJob& job, const Piece& piece, float* y) {
  const int padded = (piece.count + kLanes - 1) / kLanes * kLanes;
  load_floats(at(job.out, job.dtype, piece.at(job.width)), job.dtype, piece.count, padded, y);
  float* amax = job.out_amax + piece.group(job);
  for (int begin = 0; begin < piece.count; begin += job.format.group_size) {
    const int n = padded - begin < job.format.group_size ? padded - begin : job.format.group_size;
    const uint32_t top = largest_bits(y + begin, n);
    *amax++ = bits_float(top < kInfBits ? top : largest_finite_bits(y + begin, n));
  }
}

template <Activation kind, bool kGated>
void forward(const ActivationJob& job, const Piece& piece) {
  alignas(64) float gates[kBlock], ups[kBlock];
  const Source gate = open_operand(job, job.gate, piece, gates), up = kGated ? open_operand(job, job.up, piece, ups) : gate;
  const bool keep = job.gate.values != nullptr && job.gate.codes != nullptr && gate.dtype != DType::kFloat32;
  produce({at(job.out, job.dtype, piece.at(job.width))}, job.dtype, piece.count, [&](int i, F(&y)[1]) __attribute__((always_inline)) {
    const F x = load_part(gate, i, piece.count);
    y[0] = activation_value<kind>(x);
    if (keep) store(gates + i, x);
    if (kGated) {
      const F u = load_part(up, i, piece.count);
      if (keep) store(ups + i, u);
      y[0] = mul(y[0], u);
    }
  });
  encode_operand(job, job.gate, piece, gate, gates);
  if (kGated) encode_operand(job, job.up, piece, up, ups);
  if (job.out_amax != nullptr) store_amax(job, piece, gates);
}

template <Activation kind>
void backward(const ActivationJob& job, const Piece& piece) {
  alignas(64) float xs[kBlock];
  const Source x = open_operand(job, job.gate, piece, xs), dy{at(job.dy, job.dtype, piece.at(job.width)), job.dtype};
  produce({at(job.out, job.dtype, piece.at(job.width))}, job.dtype, piece.count, [&](int i, F(&dx)[1]) __attribute__((always_inline)) {
    F value;
    dx[0] = mul(load_part(dy, i, piece.count), activation_slope<kind>(load_part(x, i, piece.count), &value));
  });
}

template <Activation kind>
void gated_backward(const ActivationJob& job, const Piece& piece) {
  alignas(64) float gates[kBlock], ups[kBlock];
  const Source gate = open_operand(job, job.gate, piece, gates), up = open_operand(job, job.up, piece, ups);
  const Source dy{at(job.dy, job.dtype, piece.at(job.width)), job.dtype};
  const int64_t first = piece.at(2 * job.width), second = first + job.width;
  void* const dgate = at(job.out, job.dtype, job.gate_first ? first : second);
  void* const dup = at(job.out, job.dtype, job.gate_first ? second : first);
  produce({dgate, dup}, job.dtype, piece.count, [&](int i, F(&gradients)[2]) __attribute__((always_inline)) {
    F value;
    const F slope = activation_slope<kind>(load_part(gate, i, piece.count), &value), d = load_part(dy, i, piece.count);
    gradients[0] = mul(mul(d, load_part(up, i, piece.count)), slope);
    gradients[1] = mul(d, value);
  });
}

using Run = void (*)(const ActivationJob&, const Piece&);

template <Activation kind>
Run choose(const ActivationJob& job) {
  if (job.dy == nullptr) return job.gated() ? forward<kind, true> : forward<kind, false>;
  return job.gated() ? gated_backward<kind> : backward<kind>;
}

}  // namespace

void activation(const ActivationJob& job, int64_t begin, int64_t end) {
  const Run run = job.kind == Activation::kSilu   ? choose<Activation::kSilu>(job)
                  : job.kind == Activation::kGelu ? choose<Activation::kGelu>(job)
                                                  : choose<Activation::kGeluTanh>(job);
  const int64_t pieces = (job.width + kBlock - 1) / kBlock;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i % pieces * kBlock, left = job.width - first;
    run(job, {i / pieces, first, static_cast<int>(left < kBlock ? left : kBlock)});
  }
}

}  // namespace coat::COAT_ISA
