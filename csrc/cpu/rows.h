// Rows of any dtype as vectors: what kernels on rows [R, row] share.
#pragma once

#include "came_simd.h"
#include "convert.h"
#include "norm.h"
#include "scaled8.h"

namespace coat::COAT_ISA {

template <DType kType>
COAT_SIMD_INLINE F load_vector(const void* p, int64_t i) {
  if constexpr (kType == DType::kFloat32) {
    return load(static_cast<const float*>(p) + i);
  } else if constexpr (kType == DType::kBFloat16) {
    return load_bf16(static_cast<const uint16_t*>(p) + i);
  } else {
    return load_f16(static_cast<const uint16_t*>(p) + i);
  }
}

template <DType kType>
COAT_SIMD_INLINE void store_vector(void* p, int64_t i, F x) {
  if constexpr (kType == DType::kFloat32) {
    store(static_cast<float*>(p) + i, x);
  } else if constexpr (kType == DType::kBFloat16) {
    store_bf16(static_cast<uint16_t*>(p) + i, x);
  } else {
    store_f16(static_cast<uint16_t*>(p) + i, x);
  }
}

// The last n - i elements of a row, fewer than a vector, with zeros behind them.
template <DType kType>
COAT_SIMD_INLINE F load_tail(const void* p, int64_t i, int64_t n) {
  alignas(64) float values[kLanes];
  load_floats(at(p, kType, i), kType, static_cast<int>(n - i), kLanes, values);
  return load(values);
}

template <DType kType>
COAT_SIMD_INLINE void store_tail(void* p, int64_t i, int64_t n, F x) {
  alignas(64) float values[kLanes];
  store(values, x);
  store_floats(values, static_cast<int>(n - i), kType, at(p, kType, i));
}

COAT_SIMD_INLINE int64_t whole_vectors(int64_t n) { return n - n % kLanes; }

// A vector with zeros from lane n on.
COAT_SIMD_INLINE F first_lanes(F x, int64_t n) {
  alignas(64) float values[kLanes];
  store(values, x);
  for (int64_t i = n; i < kLanes; ++i) values[i] = 0.0f;
  return load(values);
}

template <DType kType>
struct DTypeConstant {
  static constexpr DType value = kType;
};
// body(DTypeConstant of the dtype)
template <typename Body>
COAT_SIMD_INLINE void for_dtype(DType dtype, Body body) {
  if (dtype == DType::kFloat32) {
    body(DTypeConstant<DType::kFloat32>{});
  } else if (dtype == DType::kBFloat16) {
    body(DTypeConstant<DType::kBFloat16>{});
  } else {
    body(DTypeConstant<DType::kFloat16>{});
  }
}

// Sum of term(i) over the vectors at i = 0, kLanes, ... below full; term may store.
template <typename Term>
COAT_SIMD_INLINE F sum_vectors(int64_t full, Term term) {
  F a = set1(0.0f), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * kLanes <= full; i += 4 * kLanes) {
    a = add(a, term(i));
    b = add(b, term(i + kLanes));
    c = add(c, term(i + 2 * kLanes));
    d = add(d, term(i + 3 * kLanes));
  }
  for (; i < full; i += kLanes) a = add(a, term(i));
  return add(add(a, b), add(c, d));
}

// One segment of a factor as floats, with zeros up to a whole row of memory; nothing without an array.
static inline void load_segment(const FloatArray& array, int64_t segment, int64_t row, float* out) {
  if (array.data == nullptr) return;
  load_floats(at(array.data, array.dtype, segment * row), array.dtype, static_cast<int>(row), static_cast<int>(padded_row(row)), out);
}

// What an op keeps of row r: codes and scales, or with fmt 0 values.
static inline void load_stored(const void* codes, const float* scale, DType codes_dtype, const Scaled8& format, int64_t r, int64_t row,
                               float* out) {
  if (format.fmt == 0) {
    load_floats(at(codes, codes_dtype, r * row), codes_dtype, static_cast<int>(row), static_cast<int>(padded_row(row)), out);
    return;
  }
  const int64_t groups = (row + format.group_size - 1) / format.group_size;
  decode_row(format, static_cast<const uint8_t*>(codes) + r * row, scale + r * groups, row, out);
  for (int64_t i = row; i < padded_row(row); ++i) out[i] = 0.0f;
}

// Elements that are encoded while they are in L1: whole groups, whatever their size.
constexpr int64_t kPart = 1024;

// The elements of row r from `first` on, up to kPart, which x begins with.
static inline void store_stored(void* codes, float* scale, DType codes_dtype, const Scaled8& format, int64_t r, int64_t row, int64_t first,
                                const float* x) {
  const int64_t count = row - first < kPart ? row - first : kPart;
  if (format.fmt == 0) {
    store_floats(x, static_cast<int>(count), codes_dtype, at(codes, codes_dtype, r * row + first));
    return;
  }
  const int64_t groups = (row + format.group_size - 1) / format.group_size;
  encode_row(format, x, count, static_cast<uint8_t*>(codes) + r * row + first, scale + r * groups + first / format.group_size);
}

}  // namespace coat::COAT_ISA
