// What the entry points of every op share: the kernels in use, threads, and the rows of a pointer table.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"

namespace coat {

// The kernels of the instruction set in use.
const Kernels& kernels_in_use();

// work(begin, end) over [0, units) on up to `threads` threads, this one among them; fewer where there are few elements.
void parallel(int64_t units, int64_t elements, int threads, const std::function<void(int64_t, int64_t)>& work);

// Says that an output is about to be written whole. The C library takes fresh pages for every array of 32 MiB and more; in pages of 4 KiB
// their faults cost more than the kernel: dequantizing 14M elements to float32 took 1.6 ns an element, and 0.7 in huge pages.
void expect_whole_write(void* output, int64_t bytes);

inline int64_t num_groups(int64_t numel, int group_size) { return (numel + group_size - 1) / group_size; }

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// What the tables of moments share: columns 0 to 3 and 6 to 8, and the corrections of the step that is reached. Counts the tensor's step
// up and returns it.
template <typename Row, typename Hyper>
uint32_t open_row(const int64_t* entry, const Hyper& hyper, Row* row) {
  row->param = pointer<void>(entry[0]);
  row->grad = pointer<const void>(entry[1]);
  row->exp_avg = pointer<void>(entry[2]);
  row->exp_avg_sq = pointer<void>(entry[3]);
  row->residual = pointer<int8_t>(entry[6]);
  float* const step = pointer<float>(entry[7]);
  *step += 1;
  const double t = static_cast<double>(*step);
  row->numel = entry[8];
  row->step_size = static_cast<float>(hyper.lr / (1 - std::pow(hyper.beta1, t)));
  row->inv_bias2_root = static_cast<float>(1 / std::sqrt(1 - std::pow(hyper.beta2, t)));
  return static_cast<uint32_t>(t);
}

// Runs step(row, from, to) over the groups of all rows. A row has `numel` and is told its `first_group` among those of all.
template <typename Row, typename Step>
void parallel_rows(std::vector<Row>& rows, int group_size, int threads, Step step) {
  int64_t groups = 0, elements = 0;
  for (Row& row : rows) {
    row.first_group = groups;
    groups += num_groups(row.numel, group_size);
    elements += row.numel;
  }
  parallel(groups, elements, threads, [&](int64_t begin, int64_t end) {
    // the row that holds group `begin`: the last one that starts at or before it
    auto row = std::upper_bound(rows.begin(), rows.end(), begin, [](int64_t group, const Row& r) { return group < r.first_group; });
    for (row -= row == rows.begin() ? 0 : 1; row != rows.end() && row->first_group < end; ++row) {
      const int64_t row_groups = num_groups(row->numel, group_size);
      const int64_t from = std::max<int64_t>(begin - row->first_group, 0), to = std::min(end - row->first_group, row_groups);
      if (from < to) step(*row, from, to);
    }
  });
}

}  // namespace coat
