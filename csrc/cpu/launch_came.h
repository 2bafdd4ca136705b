// The CAME step's entry point, bound by bind_came.cpp.
#pragma once

#include "came_8bit.h"

namespace coat {

constexpr int kCameColumns = 20, kCameNumbers = 8;

// TensorNumbers of ops/came_8bit/settings.py.
struct CameNumbers {
  const float* rows;    // [n_tensors, kCameNumbers]
  const float* tables;  // [n_tables, 256]
  int64_t n_tables;
};

// table: int64 [n_tensors, kCameColumns], the columns of ops/came_8bit/settings.py. Counts every tensor's step up.
void came_8bit(const int64_t* table, int64_t n_tensors, const CameNumbers& numbers, CameJob job, int threads);

}  // namespace coat
