// What the CAME step is told, and how its stored states mean numbers.
#pragma once

#include "blockwise.h"
#include "team.h"

namespace coat {

enum class CamePhase : int { kEarly = 0, kMiddle = 1, kLate = 2 };

// A row of the pointer table: the columns of ops/came_8bit/settings.py, null for what a state lacks. Vectors have all of v and r in the
// columns' arrays. step lies in host memory, lr_max is the host's.
struct CameRow {
  void* param;
  const void* grad;
  void* exp_avg;
  float* exp_avg_absmax;
  void *torque, *lr_mask;
  uint8_t* polarity;
  void* edge_history;
  uint16_t* row_variance;  // bfloat16
  float *exp_avg_sq_row, *exp_avg_sq_col, *res_row, *res_col;
  const float *tail, *lr_max, *step;
  int64_t numel, index, rows, cols;
};

// TensorNumbers of settings.py.
struct CameNumbers {
  float beta1, bias_correction2, bias_correction3, lr_factor, lr_raise, lr_start, old_table, new_table;
};

// grad_scale and grad_l1 may be null: then 1, and grad_l1_value. `workspace` has `workspace_floats` for each team.
struct CameArguments {
  const CameRow* rows;
  const CameNumbers* numbers;
  const float* tables;  // [n_tables, 256]
  const int2* jobs;     // row, and the step its count reaches
  float* workspace;
  unsigned* arrived;
  double* partial;
  const float *grad_scale, *grad_l1;
  int64_t workspace_floats;
  float beta2, rest2, beta3, rest3, eps1, eps2, eps3, grad_l1_value, eta;
  float clip_threshold, weight_decay, min_lr, max_lr, lr_bump, adaptation_rate, edge_penalty, edge_threshold;
  float frequency_penalty, rank_penalty_strength, low_rank_emphasis, detail_preservation;
  uint32_t seed;
  int32_t n_jobs, one_team, amp, phase, use_8bit, block_size, came;
  int32_t edge_suppression, background_regularization, param_dtype, grad_dtype, param_rounding, maximize;
};

constexpr float kTiny = 1e-30f, kMostByMoment = 1e30f, kMostByInstability = 1e12f, kHistoryMax = 9.0f;
constexpr uint32_t kStreamMask = 4, kStreamHistory = 5;

// Arrays of a tensor's workspace behind its gradient and momentum: [max(cols, team)]; [cols]; [rows].
struct CameWorkspace {
  float *partial, *col_v, *col_r, *col_m, *col_h, *row_v, *row_r, *row_scale, *row_bump, *row_keep;
};

struct CameShared {
  double sums[kThreads];
  CameWorkspace at;  // here, as registers are short
  Dynamic8Tables exp_avg;
  float old_mask[256], new_mask[256];
};

__device__ inline float load_element(const void* base, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return in_global(static_cast<const float*>(base))[i];
  const uint16_t stored = in_global(static_cast<const uint16_t*>(base))[i];
  return dtype == DType::kBFloat16 ? from_bfloat16(stored) : float16_value(stored);
}

// |x| with its NaN, at most 1.
__device__ inline float at_most_one(float x) { return x > 1 ? 1.0f : x; }
__device__ inline float clamp_float(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// In (0, 1), of element i.
__device__ inline float uniform8(uint32_t key, int64_t i) {
  return (static_cast<float>((random_word(key, static_cast<uint32_t>(i >> 2)) >> (8 * (i & 3))) & 0xFF) + 0.5f) / 256;
}

__device__ inline float history_value(int code) {
  const float share = static_cast<float>(code) / 255;
  return __fmul_rn(kHistoryMax, __fmul_rn(share, share));
}

// The code of an ascending table below or above x, with odds that keep its expectation; the search begins at `guess`.
template <typename Table>
__device__ inline uint8_t encode_by_chance(float x, int guess, Table table, uint32_t key, int64_t i) {
  int code = clamp_int(guess, 0, 254);
  while (code < 254 && table(code + 1) <= x) ++code;
  while (code > 0 && table(code) > x) --code;
  const float low = table(code), gap = table(code + 1) - low, odds = gap > 0 ? (x - low) / gap : 0.0f;
  return static_cast<uint8_t>(code + (uniform8(key, i) < odds));
}

}  // namespace coat
