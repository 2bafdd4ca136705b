// How kernels on rows [R, row] are spread over threads, and how sums over rows add up.
#pragma once

#include <cstdint>
#include <functional>

namespace coat {

// work(memory, begin, end) over rows, with `floats` of memory of its own for each call.
void each_row(int64_t rows, int64_t row, int threads, int64_t floats, const std::function<void(float*, int64_t, int64_t)>& work);

// work(memory, begin, end, first, second) over blocks of rows of one segment, in sums on cache lines with padding behind the row: it adds
// to first and second what its rows contribute to out[0] and out[1], each [segments, row] or null. Blocks depend on the shape alone and
// are added in order: the result does not depend on the number of threads.
struct RowSums {
  int64_t rows, row, segments;
  float* out[2];
};
void sum_rows(const RowSums& sums, int threads, int64_t floats, const std::function<void(float*, int64_t, int64_t, float*, float*)>& work);

}  // namespace coat
