// RMSNorm and LayerNorm that save 8 bits. Compiled once for each instruction set.
#include <cmath>

#include "rows.h"

namespace coat::COAT_ISA {
namespace {

// gain and shift of the segment that a row lies in, as floats; 1 and 0 where there are none.
class SegmentFactors {
 public:
  SegmentFactors(const NormFactors& factors, int64_t row, float* memory)
      : factors_(factors), row_(row), gain(memory), shift(memory + padded_row(row)) {
    for (int64_t i = 0; i < padded_row(row); ++i) {
      gain[i] = 1.0f;
      shift[i] = 0.0f;
    }
  }
  void enter_row(int64_t r) {
    const int64_t segment = r / factors_.segment_rows;
    if (segment == segment_) return;
    segment_ = segment;
    load_segment(factors_.gain, segment, row_, gain);
    load_segment(factors_.shift, segment, row_, shift);
    if (factors_.gain.data != nullptr && factors_.plus_one) {
      for (int64_t i = 0; i < row_; ++i) gain[i] += 1.0f;
    }
  }
  bool any() const { return factors_.gain.data != nullptr || factors_.shift.data != nullptr; }

 private:
  const NormFactors& factors_;
  int64_t row_, segment_ = -1;

 public:
  float *const gain, *const shift;
};

// What is known of a row: where its whole vectors lie as floats, its last, shorter vector, its mean (0 unless centered) and its rstd.
struct Statistics {
  const float* x;
  F tail, mean;
  float rstd;
};

// Reads a row. float32 stays where it is; other dtypes are converted into memory.
template <DType kType, bool kCenter>
Statistics read_row(const void* in, int64_t n, float eps, float* memory) {
  const int64_t full = whole_vectors(n);
  const float inverse = 1.0f / static_cast<float>(n);
  Statistics row{kType == DType::kFloat32 ? static_cast<const float*>(in) : memory, set1(0.0f), set1(0.0f), 0};
  F total = sum_vectors(full, [&](int64_t i) COAT_LAMBDA_INLINE {
    const F v = load_vector<kType>(in, i);
    if constexpr (kType != DType::kFloat32) store(memory + i, v);
    return kCenter ? v : mul(v, v);
  });
  if (full < n) {
    row.tail = load_tail<kType>(in, full, n);
    total = add(total, kCenter ? row.tail : mul(row.tail, row.tail));
  }
  if constexpr (kCenter) {
    row.mean = set1(sum(total) * inverse);
    total = sum_vectors(full, [&](int64_t i) COAT_LAMBDA_INLINE {
      const F v = sub(load(row.x + i), row.mean);
      return mul(v, v);
    });
    if (full < n) {
      const F v = first_lanes(sub(row.tail, row.mean), n - full);
      total = add(total, mul(v, v));
    }
  }
  row.rstd = 1.0f / std::sqrt(sum(total) * inverse + eps);
  return row;
}

// y = h · gain + shift with h = (x - mean) · rstd, for the elements from `first` on, up to kPart; kSave keeps h in `part`.
template <DType kType, bool kCenter, bool kFactors, bool kSave>
COAT_SIMD_INLINE void write_part(const Statistics& row, int64_t n, int64_t first, const SegmentFactors& factors, float* part, void* y) {
  const int64_t last = n - first < kPart ? n : first + kPart, full = last - (last - first) % kLanes;
  const F scale = set1(row.rstd);
  const auto output = [&](int64_t i, F v) COAT_LAMBDA_INLINE {
    const F h = mul(kCenter ? sub(v, row.mean) : v, scale);
    if constexpr (kSave) store(part + i - first, h);
    return kFactors ? add(mul(h, load(factors.gain + i)), load(factors.shift + i)) : h;
  };
  for (int64_t i = first; i < full; i += kLanes) store_vector<kType>(y, i, output(i, load(row.x + i)));
  if (full < last) store_tail<kType>(y, full, last, output(full, row.tail));
}

template <DType kType, bool kCenter, bool kFactors>
void write_output(const Statistics& row, int64_t n, const SegmentFactors& factors, void* y) {
  for (int64_t first = 0; first < n; first += kPart) write_part<kType, kCenter, kFactors, false>(row, n, first, factors, nullptr, y);
}

// The largest finite magnitude of each group of a row of y.
void write_amax(const void* y, DType dtype, int64_t n, int group_size, float* out) {
  alignas(64) float values[kMaxRowGroup];
  for (int64_t first = 0; first < n; first += group_size) {
    const int count = static_cast<int>(n - first < group_size ? n - first : group_size);
    const int padded = (count + kLanes - 1) / kLanes * kLanes;
    load_floats(at(y, dtype, first), dtype, count, padded, values);
    const uint32_t top = largest_bits(values, padded);
    *out++ = bits_float(top < kInfBits ? top : largest_finite_bits(values, count));
  }
}

template <DType kType, bool kCenter, bool kFactors>
void norm_rows(const NormJob& job, float* memory, int64_t begin, int64_t end) {
  const int64_t n = job.row, groups = (n + job.group_size - 1) / job.group_size;
  const Scaled8 format{job.fmt, job.group_size};
  SegmentFactors factors(job.factors, n, memory + padded_row(n));
  for (int64_t r = begin; r < end; ++r) {
    if constexpr (kFactors) factors.enter_row(r);
    const Statistics row = read_row<kType, kCenter>(at(job.x, kType, r * n), n, job.eps, memory);
    void* const y = at(job.y, kType, r * n);
    if (job.codes == nullptr) {
      write_output<kType, kCenter, kFactors>(row, n, factors, y);
    } else {
      job.rstd[r] = row.rstd;
      for (int64_t first = 0; first < n; first += kPart) {
        alignas(64) float part[kPart];
        write_part<kType, kCenter, kFactors, true>(row, n, first, factors, part, y);
        store_stored(job.codes, job.scale, kType, format, r, n, first, part);
      }
    }
    if (job.y_amax != nullptr) write_amax(y, kType, n, job.group_size, job.y_amax + r * groups);
  }
}

template <DType kType, bool kCenter, bool kGain>
void backward_rows(const NormBackwardJob& job, float* memory, int64_t begin, int64_t end, float* dgain, float* dshift) {
  const int64_t n = job.row, full = whole_vectors(n);
  const Scaled8 format{job.fmt, job.group_size};
  const bool need_h = job.dx != nullptr || dgain != nullptr;
  float *const h = memory, *const grad = memory + padded_row(n), *const gain = memory + 2 * padded_row(n);
  if constexpr (kGain) {  // the rows of a block lie in one segment
    load_segment(job.factors.gain, begin / job.factors.segment_rows, n, gain);
    if (job.factors.plus_one) {
      for (int64_t i = 0; i < n; ++i) gain[i] += 1.0f;
    }
  }
  for (int64_t r = begin; r < end; ++r) {
    if (need_h) load_stored(job.codes, job.scale, job.codes_dtype, format, r, n, h);
    const void* const dy = at(job.dy, kType, r * n);
    if (dgain != nullptr || dshift != nullptr) {
      const auto accumulate = [&](int64_t i, F v) COAT_LAMBDA_INLINE {
        if (dshift != nullptr) store(dshift + i, add(load(dshift + i), v));
        if (dgain != nullptr) store(dgain + i, fma(v, load(h + i), load(dgain + i)));
      };
      for (int64_t i = 0; i < full; i += kLanes) accumulate(i, load_vector<kType>(dy, i));
      if (full < n) accumulate(full, load_tail<kType>(dy, full, n));
    }
    if (job.dx == nullptr) continue;
    F straight[2] = {set1(0.0f), set1(0.0f)}, along[2] = {set1(0.0f), set1(0.0f)};
    const auto gather_sums = [&](int64_t i, F v, int k) COAT_LAMBDA_INLINE {
      const F g = kGain ? mul(v, load(gain + i)) : v;
      store(grad + i, g);
      if constexpr (kCenter) straight[k] = add(straight[k], g);
      along[k] = fma(g, load(h + i), along[k]);
    };
    int64_t i = 0;
    for (; i + 2 * kLanes <= full; i += 2 * kLanes) {
      gather_sums(i, load_vector<kType>(dy, i), 0);
      gather_sums(i + kLanes, load_vector<kType>(dy, i + kLanes), 1);
    }
    for (; i < full; i += kLanes) gather_sums(i, load_vector<kType>(dy, i), 0);
    if (full < n) gather_sums(full, load_tail<kType>(dy, full, n), 0);
    const float inverse = 1.0f / static_cast<float>(n);
    const F mean = set1(sum(add(straight[0], straight[1])) * inverse), slope = set1(sum(add(along[0], along[1])) * inverse);
    const F rstd = set1(job.rstd[r]);
    const auto input = [&](int64_t k) COAT_LAMBDA_INLINE {
      const F g = kCenter ? sub(load(grad + k), mean) : load(grad + k);
      return mul(fnma(load(h + k), slope, g), rstd);
    };
    void* const dx = at(job.dx, kType, r * n);
    for (int64_t k = 0; k < full; k += kLanes) store_vector<kType>(dx, k, input(k));
    if (full < n) store_tail<kType>(dx, full, n, input(full));
  }
}

}  // namespace

void norm(const NormJob& job, float* memory, int64_t begin, int64_t end) {
  const bool factors = job.factors.gain.data != nullptr || job.factors.shift.data != nullptr;
  for_dtype(job.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    if (job.center) {
      (factors ? norm_rows<kType, true, true> : norm_rows<kType, true, false>)(job, memory, begin, end);
    } else {
      (factors ? norm_rows<kType, false, true> : norm_rows<kType, false, false>)(job, memory, begin, end);
    }
  });
}

void norm_from_codes(const NormFromCodesJob& job, float* memory, int64_t begin, int64_t end) {
  const int64_t n = job.row;
  const Scaled8 format{job.fmt, job.group_size};
  SegmentFactors factors(job.factors, n, memory + padded_row(n));
  for_dtype(job.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    for (int64_t r = begin; r < end; ++r) {
      factors.enter_row(r);
      load_stored(job.codes, job.scale, job.codes_dtype, format, r, n, memory);
      const Statistics row{memory, load(memory + whole_vectors(n)), set1(0.0f), 1.0f};
      void* const y = at(job.y, kType, r * n);
      (factors.any() ? write_output<kType, false, true> : write_output<kType, false, false>)(row, n, factors, y);
    }
  });
}

void norm_backward(const NormBackwardJob& job, float* memory, int64_t begin, int64_t end, float* dgain, float* dshift) {
  for_dtype(job.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    const bool gain = job.factors.gain.data != nullptr;
    if (job.center) {
      (gain ? backward_rows<kType, true, true> : backward_rows<kType, true, false>)(job, memory, begin, end, dgain, dshift);
    } else {
      (gain ? backward_rows<kType, false, true> : backward_rows<kType, false, false>)(job, memory, begin, end, dgain, dshift);
    }
  });
}

}  // namespace coat::COAT_ISA
