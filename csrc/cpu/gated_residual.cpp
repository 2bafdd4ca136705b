// residual + gate · x with x saved in 8 bits. Compiled once for each instruction set.
#include "gated_residual.h"

#include "rows.h"

namespace coat::COAT_ISA {
namespace {

template <DType kType, bool kSave>
void forward_rows(const GatedResidualJob& job, float* gate, int64_t begin, int64_t end) {
  const int64_t n = job.row;
  const Scaled8 format{job.fmt, job.group_size};
  int64_t segment = -1;
  for (int64_t r = begin; r < end; ++r) {
    if (r / job.segment_rows != segment) {
      segment = r / job.segment_rows;
      load_segment(job.gate, segment, n, gate);
    }
    const void* const in = at(job.x, kType, r * n);
    const void* const residual = at(job.residual, kType, r * n);
    void* const y = at(job.y, kType, r * n);
    for (int64_t first = 0; first < n; first += kPart) {
      alignas(64) float part[kPart];
      const int64_t last = n - first < kPart ? n : first + kPart, full = last - (last - first) % kLanes;
      const auto output = [&](int64_t i, F v, F base) COAT_LAMBDA_INLINE {
        if constexpr (kSave) store(part + i - first, v);
        return add(base, mul(v, load(gate + i)));
      };
      for (int64_t i = first; i < full; i += kLanes) {
        store_vector<kType>(y, i, output(i, load_vector<kType>(in, i), load_vector<kType>(residual, i)));
      }
      if (full < last) store_tail<kType>(y, full, n, output(full, load_tail<kType>(in, full, n), load_tail<kType>(residual, full, n)));
      if constexpr (kSave) store_stored(job.codes, job.scale, kType, format, r, n, first, part);
    }
  }
}

template <DType kType>
void backward_rows(const GatedResidualBackwardJob& job, float* memory, int64_t begin, int64_t end, float* dgate) {
  const int64_t n = job.row, full = whole_vectors(n);
  const Scaled8 format{job.fmt, job.group_size};
  float *const gate = memory, *const x = memory + padded_row(n);
  if (begin < end) load_segment(job.gate, begin / (job.rows / job.segments), n, gate);
  for (int64_t r = begin; r < end; ++r) {
    const void* const dy = at(job.dy, kType, r * n);
    if (job.dx != nullptr) {
      void* const dx = at(job.dx, kType, r * n);
      for (int64_t i = 0; i < full; i += kLanes) store_vector<kType>(dx, i, mul(load_vector<kType>(dy, i), load(gate + i)));
      if (full < n) store_tail<kType>(dx, full, n, mul(load_tail<kType>(dy, full, n), load(gate + full)));
    }
    if (dgate == nullptr) continue;
    load_stored(job.codes, job.scale, job.codes_dtype, format, r, n, x);
    const auto accumulate = [&](int64_t i, F v) COAT_LAMBDA_INLINE { store(dgate + i, fma(v, load(x + i), load(dgate + i))); };
    for (int64_t i = 0; i < full; i += kLanes) accumulate(i, load_vector<kType>(dy, i));
    if (full < n) accumulate(full, load_tail<kType>(dy, full, n));
  }
}

}  // namespace

void gated_residual(const GatedResidualJob& job, float* memory, int64_t begin, int64_t end) {
  for_dtype(job.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    (job.codes == nullptr ? forward_rows<kType, false> : forward_rows<kType, true>)(job, memory, begin, end);
  });
}

void gated_residual_backward(const GatedResidualBackwardJob& job, float* memory, int64_t begin, int64_t end, float* dgate) {
  for_dtype(job.dtype, [&](auto type) { backward_rows<decltype(type)::value>(job, memory, begin, end, dgate); });
}

}  // namespace coat::COAT_ISA
