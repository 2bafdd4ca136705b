#include "launch_rows.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "norm.h"
#include "parallel.h"
#include "workspace.h"

namespace coat {
namespace {

constexpr int64_t kBlockElements = 1 << 17;  // of a block: its sums, an element a column, cost little beside it
constexpr int64_t kColumns = 64;             // added up at a time

std::vector<Workspace> make_workspaces(int threads, int64_t units, int64_t floats) {
  std::vector<Workspace> memory;
  const int64_t count = std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(units, 1));
  for (int64_t i = 0; i < count; ++i) memory.push_back(make_workspace(floats));
  return memory;
}

}  // namespace

void each_row(int64_t rows, int64_t row, int threads, int64_t floats, const std::function<void(float*, int64_t, int64_t)>& work) {
  const std::vector<Workspace> memory = make_workspaces(threads, rows, floats);
  std::atomic<size_t> next{0};
  parallel(rows, rows * row, threads, [&](int64_t begin, int64_t end) { work(memory[next++].get(), begin, end); });
}

void sum_rows(const RowSums& sums, int threads, int64_t floats, const std::function<void(float*, int64_t, int64_t, float*, float*)>& work) {
  const int64_t padded = padded_row(sums.row), segment_rows = sums.rows / sums.segments;
  const int64_t block_rows = std::max<int64_t>(kBlockElements / sums.row, 1), per_segment = num_groups(segment_rows, block_rows);
  const int64_t blocks = sums.segments * per_segment;
  std::vector<float> partial[2];  // [blocks, row], where a segment has several
  float* target[2];
  for (int k = 0; k < 2; ++k) {
    if (sums.out[k] != nullptr && per_segment > 1) partial[k].resize(static_cast<size_t>(blocks * sums.row));
    target[k] = per_segment > 1 ? partial[k].data() : sums.out[k];
  }
  const std::vector<Workspace> memory = make_workspaces(threads, blocks, floats + 2 * padded);
  std::atomic<size_t> next{0};
  parallel(blocks, sums.rows * sums.row, threads, [&](int64_t first_block, int64_t end_block) {
    float* const own = memory[next++].get();
    float* const of_block[2] = {sums.out[0] != nullptr ? own + floats : nullptr, sums.out[1] != nullptr ? own + floats + padded : nullptr};
    for (int64_t block = first_block; block < end_block; ++block) {
      std::fill(own + floats, own + floats + 2 * padded, 0.0f);
      const int64_t start = block / per_segment * segment_rows, begin = start + block % per_segment * block_rows;
      work(own, begin, std::min(begin + block_rows, start + segment_rows), of_block[0], of_block[1]);
      for (int k = 0; k < 2; ++k) {
        if (of_block[k] != nullptr) std::copy_n(of_block[k], sums.row, target[k] + block * sums.row);
      }
    }
  });
  for (int k = 0; k < 2; ++k) {
    if (sums.out[k] == nullptr || per_segment == 1) continue;
    parallel(sums.segments * num_groups(sums.row, kColumns), blocks * sums.row, threads, [&](int64_t begin, int64_t end) {
      const int64_t chunks = num_groups(sums.row, kColumns);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t segment = unit / chunks, first = unit % chunks * kColumns, count = std::min(kColumns, sums.row - first);
        double total[kColumns] = {};
        for (int64_t block = segment * per_segment; block < (segment + 1) * per_segment; ++block) {
          for (int64_t i = 0; i < count; ++i)
            total[i] += static_cast<double>(partial[k][static_cast<size_t>(block * sums.row + first + i)]);
        }
        for (int64_t i = 0; i < count; ++i) sums.out[k][segment * sums.row + first + i] = static_cast<float>(total[i]);
      }
    });
  }
}

}  // namespace coat
