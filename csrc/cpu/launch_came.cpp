#include "launch_came.h"

#include <atomic>
#include <cmath>
#include <vector>

#include "../formats/random.h"
#include "parallel.h"
#include "workspace.h"

namespace coat {
namespace {

// Columns of the table after the arrays.
constexpr int kStep = 15, kNumel = 16, kIndex = 17, kRows = 18, kCols = 19;
constexpr int kMaskSide = 127;  // codes on the shorter side of lr_mask's start
// The generator's streams of lr_mask and edge_history: a contract with settings.py.
constexpr uint32_t kStreamMask = 4, kStreamHistory = 5;

// values: float32 [256], of which three say the rest.
CameMask make_mask(const float* values) {
  CameMask mask{};
  const double start = values[kMaskStart], octaves = std::log2(values[255] / start) / kMaskSide;
  for (int i = 0; i < 16; ++i) {
    mask.hi[i] = static_cast<float>(start * std::exp2((16 * i - kMaskStart) * octaves));
    mask.lo[i] = static_cast<float>(std::exp2(i * octaves));
  }
  mask.of_unit = kMaskStart;
  mask.odds[0] = 256;
  if (!(octaves > 0)) return mask;  // min_lr = max_lr, which all codes stand for
  mask.per_octave = static_cast<float>(1 / octaves);
  mask.of_unit = static_cast<float>(kMaskStart - std::log2(start) / octaves);
  // exact at f = 1/2 and 1
  const double half = 1 / (std::exp2(octaves / 2) + 1);
  mask.odds[1] = static_cast<float>(256 * (2 - 4 * half));
  mask.odds[0] = static_cast<float>(256 * (4 * half - 1));
  return mask;
}

CameRow make_row(const int64_t* entry, const CameNumbers& numbers, int64_t i, const CameJob& job, const std::vector<CameMask>& masks) {
  CameRow row{};
  row.param = pointer<void>(entry[0]);
  row.grad = pointer<const void>(entry[1]);
  row.exp_avg = pointer<void>(entry[2]);
  row.exp_avg_absmax = pointer<float>(entry[3]);
  row.torque = pointer<void>(entry[4]);
  row.lr_mask = pointer<void>(entry[5]);
  row.polarity = pointer<uint8_t>(entry[6]);
  row.edge_history = pointer<void>(entry[7]);
  row.row_variance = pointer<uint16_t>(entry[8]);
  row.exp_avg_sq_row = pointer<float>(entry[9]);
  row.exp_avg_sq_col = pointer<float>(entry[10]);
  row.res_row = pointer<float>(entry[11]);
  row.res_col = pointer<float>(entry[12]);
  row.tail = pointer<const float>(entry[13]);
  float* const step = pointer<float>(entry[kStep]);
  *step += 1;
  row.numel = entry[kNumel];
  row.rows = entry[kRows];
  row.cols = entry[kCols];
  const float* const own = numbers.rows + kCameNumbers * i;
  row.beta1 = own[0];
  row.bias_correction2 = own[1];
  row.bias_correction3 = own[2];
  row.lr_factor = own[3];
  row.lr_raise = own[4];
  row.lr_start = own[5];
  row.first = own[6] < 0;
  if (!masks.empty()) {
    row.old_mask = row.first ? nullptr : &masks[static_cast<size_t>(own[6])];
    row.new_mask = &masks[static_cast<size_t>(own[7])];
  }
  const auto key = [&](uint32_t stream) {
    return stream_key(job.seed, static_cast<uint32_t>(*step), static_cast<uint32_t>(entry[kIndex]), stream);
  };
  row.param_key = key(kStreamParam);
  row.mask_key = key(kStreamMask);
  row.history_key = key(kStreamHistory);
  return row;
}

}  // namespace

void came_8bit(const int64_t* table, int64_t n_tensors, const CameNumbers& numbers, CameJob job, int threads) {
  const Kernels& kernels = kernels_in_use();
  job.exp_avg_map = &dynamic8_tables(true);
  int64_t elements = 0, floats = 0;
  for (int64_t i = 0; i < n_tensors; ++i) {
    const int64_t* const entry = table + kCameColumns * i;
    elements += entry[kNumel];
    floats = std::max(floats, came_workspace(entry[kRows], entry[kCols]).total());
  }
  // Before anything changes: there may be no memory for it.
  std::vector<Workspace> memory;
  for (int64_t i = 0; i < std::min<int64_t>(std::max(threads, 1), n_tensors); ++i) memory.push_back(make_workspace(floats));

  std::vector<CameMask> masks;
  for (int64_t i = 0; i < numbers.n_tables; ++i) masks.push_back(make_mask(numbers.tables + 256 * i));
  std::vector<CameRow> rows;
  rows.reserve(static_cast<size_t>(n_tensors));
  for (int64_t i = 0; i < n_tensors; ++i) rows.push_back(make_row(table + kCameColumns * i, numbers, i, job, masks));
  // Tensors are handed out one by one: their sizes differ, and none is split.
  std::atomic<int64_t> next_tensor{0};
  std::atomic<size_t> next_workspace{0};
  parallel(n_tensors, elements, threads, [&](int64_t, int64_t) {
    float* const own = memory[next_workspace++].get();
    for (int64_t i = next_tensor++, after; i < n_tensors; i = after) {
      after = next_tensor++;
      CameRow& row = rows[static_cast<size_t>(i)];
      row.next_grad = after < n_tensors ? rows[static_cast<size_t>(after)].grad : nullptr;
      kernels.came_8bit(job, row, own);
    }
  });
}

}  // namespace coat
