// Sum of magnitudes over tensors, bound by bind_came.cpp.
#pragma once

#include <cstdint>

#include "../formats/parameters.h"

namespace coat {

// Sum of |x| over arrays of one dtype: rows of `tensors`, int64 [n_tensors, 2], are address and element count. The same on any number of
// threads.
double sum_magnitudes(const int64_t* tensors, int64_t n_tensors, DType dtype, int threads);

}  // namespace coat
