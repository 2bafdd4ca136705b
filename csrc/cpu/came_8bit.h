// The CAME step: what its launcher and the kernels built for each instruction set share. Plain structs, as in kernels.h.
#pragma once

#include <cstdint>

#include "../formats/dynamic8.h"
#include "../formats/parameters.h"

namespace coat {

enum class CamePhase : int { kEarly = 0, kMiddle = 1, kLate = 2 };

// What every tensor of a launch shares: CameFormat and CameSettings of ops/came_8bit/settings.py, under their names there.
struct CameJob {
  bool amp;  // rule "cameamp"
  CamePhase phase;
  bool use_8bit;
  int block_size;
  bool came, edge_suppression, background_regularization;
  DType param_dtype, grad_dtype;
  ParamRounding param_rounding;
  uint32_t seed;
  double beta2, beta3, eps1, eps2, clip_threshold, weight_decay;
  double grad_factor;  // 1 / grad_scale, negative to maximize
  double inv_grad_l1;  // 1 / (sum of |g| + eps3)
  double min_lr, max_lr, lr_bump, adaptation_rate, edge_penalty, edge_threshold, frequency_penalty, rank_penalty_strength;
  double low_rank_emphasis, detail_preservation;
  double eta;  // 0: no row scaling
  const Dynamic8Tables* exp_avg_map;
};

constexpr int kMaskStart = 128;  // lr_mask's code of the start value

// lr_mask's codes of one start value, start * 2^((code - 128) * octaves).
struct CameMask {
  float hi[16], lo[16];       // the value of a code is hi[code >> 4] * lo[code & 15]
  float per_octave, of_unit;  // the real-valued code of x is per_octave * log2(x) + of_unit
  float odds[2];              // 256 (2^(f octaves) - 1) / (2^octaves - 1) of a fraction f: coefficients of f and f^2
};

// One tensor: addresses (null for what its state lacks) and its own numbers, NUMBERS of settings.py.
struct CameRow {
  void* param;
  const void* grad;
  void* exp_avg;
  float* exp_avg_absmax;
  void *torque, *lr_mask;
  uint8_t* polarity;
  void* edge_history;
  uint16_t* row_variance;                                      // bfloat16
  float *exp_avg_sq_row, *exp_avg_sq_col, *res_row, *res_col;  // vectors: no rows, and all of v and r in the columns'
  const float* tail;
  int64_t numel, rows, cols;
  float beta1, bias_correction2, bias_correction3, lr_factor, lr_raise, lr_start;
  bool first;                           // no past: the mask is lr_start
  const CameMask *old_mask, *new_mask;  // what codes mean before and after the step; null without a mask
  uint32_t param_key, mask_key, history_key;
  const void* next_grad;  // of the tensor that this thread takes next: brought to L2 meanwhile
};

// Elements that a pass works on at a time: its buffers stay in L1.
constexpr int64_t kCameTile = 2048;
// Longest shorter side of a matrix under the rank penalty.
constexpr int64_t kCameTail = 128;
// Rows of a workspace are padded to whole vectors of at most this many floats.
constexpr int64_t kCameLanes = 16;

struct CameWorkspaceSizes {
  int64_t whole, cols, rows;  // floats
  int64_t total() const { return 2 * whole + 3 * cols + 6 * rows + kCameTail * (kCameTail + 4 * kCameLanes); }
};

static inline CameWorkspaceSizes came_workspace(int64_t rows, int64_t cols) {
  const auto padded = [](int64_t n) { return (n + kCameLanes - 1) / kCameLanes * kCameLanes; };
  // A margin on either side: neighbours of border elements are read, and what is read there is not used. Half a page between one
  // workspace and the next: at the same offset in their pages, loads from one would wait for stores to the other.
  constexpr int64_t page = 1024;
  return {(rows * padded(cols) + 2 * kCameLanes + page - 1) / page * page + page / 2, padded(cols) + 2 * kCameLanes, padded(2 * rows)};
}

}  // namespace coat
