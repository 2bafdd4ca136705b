// The moments of the CAME step: the factored second moment, torque and momentum, the factored instability.
#pragma once

#include <cmath>

#include "blockwise_map.h"
#include "came_states.h"

namespace coat::COAT_ISA {

constexpr float kMostByMoment = 1e30f, kMostByInstability = 1e12f;  // 1 / the least root that is divided by

// Elements first .. first + n - 1 of the tensor between `flat` and the padded rows of a workspace.
template <bool kToRows, typename T>
COAT_SIMD_INLINE void copy_flat(const Work& w, int64_t first, int n, T* flat, T* rows) {
  int64_t row = first / w.cols, col = first % w.cols;
  while (n > 0) {
    const int count = static_cast<int>(w.cols - col < n ? w.cols - col : n);
    T* const line = rows + row * w.stride + col;
    memcpy(kToRows ? line : flat, kToRows ? flat : line, static_cast<size_t>(count) * sizeof(T));
    flat += count;
    n -= count;
    ++row;
    col = 0;
  }
}

// The stored momentum into its workspace.
static inline void load_momentum(Work& w) {
  const CameRow& row = *w.row;
  if (!w.job->use_8bit) {
    for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
      float* const m = w.momentum + in_workspace(w, tile);
      const float* const stored = open(w, tile, static_cast<float*>(row.exp_avg), m);
      if (stored != m) memcpy(m, stored, static_cast<size_t>(tile.count()) * sizeof(float));
    });
    return;
  }
  const int size = w.job->block_size;
  const float* const map = w.job->exp_avg_map->map;
  alignas(64) float staged[kMaxBlockSize];
  alignas(64) uint8_t codes[kMaxBlockSize];
  const bool dense = w.stride == w.cols;
  if (!dense) {
    for (int64_t i = 0; i < w.rows; ++i) zero(w.momentum + i * w.stride + w.cols, w.stride - w.cols);
  }
  for (int64_t first = 0, block = 0; first < row.numel; first += size, ++block) {
    const int n = static_cast<int>(row.numel - first < size ? row.numel - first : size);
    const uint8_t* from = static_cast<const uint8_t*>(row.exp_avg) + first;
    float* const to = dense ? w.momentum + first : staged;
    if (n % kLanes != 0) from = static_cast<const uint8_t*>(memcpy(codes, from, static_cast<size_t>(n)));
    const F absmax = set1(row.exp_avg_absmax[block]);
    for (int i = 0; i < n; i += kLanes) store(to + i, mul(decode(map, from + i), absmax));
    if (!dense) copy_flat<true>(w, first, n, staged, w.momentum);
  }
}

// The momentum of the workspace, which stays as it is, into its stored form.
static inline void store_momentum(const Work& w) {
  const CameRow& row = *w.row;
  if (!w.job->use_8bit) {
    for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
      const float* const m = w.momentum + in_workspace(w, tile);
      auto* const stored = static_cast<float*>(row.exp_avg);
      if (tile.dense()) memcpy(stored + in_tensor(w, tile), m, static_cast<size_t>(tile.count()) * sizeof(float));
      close(w, tile, stored, m);
    });
    return;
  }
  const int size = w.job->block_size;
  alignas(64) float staged[kMaxBlockSize];
  alignas(64) uint8_t codes[kMaxBlockSize];
  const bool dense = w.stride == w.cols;
  for (int64_t first = 0, block = 0; first < row.numel; first += size, ++block) {
    const int n = static_cast<int>(row.numel - first < size ? row.numel - first : size);
    const int padded = (n + kBlockStride - 1) / kBlockStride * kBlockStride;
    uint8_t* const stored = static_cast<uint8_t*>(row.exp_avg) + first;
    uint8_t* const to = padded == n ? stored : codes;
    float* values = w.momentum + first;
    uint32_t max_bits = kInfBits;
    if (dense && padded == n) max_bits = largest_bits(values, n);
    if (max_bits >= kInfBits) {  // a copy: what is not finite becomes 0 in it
      zero(staged + n, padded - n);
      copy_flat<false>(w, first, n, staged, w.momentum);
      values = staged;
      max_bits = largest_bits(values, padded);
    }
    row.exp_avg_absmax[block] = encode_block<MapUse::kSigned>(w.job->exp_avg_map->entry, values, padded, max_bits, to);
    if (to == codes) memcpy(stored, codes, static_cast<size_t>(n));
  }
}

// Sums over rows and columns of the squared gradient, and over rows of the gradient.
static inline void sum_gradient(Work& w) {
  zero(w.col_sq, w.stride);
  zero(w.row_sum, w.rows);
  zero(w.row_sq, w.rows);
  for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
    for (int r = 0; r < tile.rows; ++r) {
      const Tile line = row_of(tile, r);
      const float* const g = w.gradient + in_workspace(w, line);
      float* const col_sq = w.col_sq + line.col;
      F sums = set1(0.0f), squares = set1(0.0f);
      const Ahead torque = ahead(w, line, w.row->torque, w.job->use_8bit ? 1 : 4);
      for (int j = 0; j < tile.width; j += kLanes) {
        torque.fetch(j);
        const F x = load(g + j), square = mul(x, x);
        sums = add(sums, x);
        squares = add(squares, square);
        store(col_sq + j, add(load(col_sq + j), square));
      }
      w.row_sum[line.row] += sum(sums);
      w.row_sq[line.row] += sum(squares);
    }
  });
}

// Advances a second moment by the sums of squares (row_sq and `col_sq`, of rows and of columns) and leaves 1 / sqrt of it, bias corrected,
// as row_factor times col_factor. A vector has no rows, and its columns hold it whole.
static inline void advance_factors(Work& w, float* row_state, float* col_state, const float* col_sq, double beta, float correction,
                                   double eps) {
  const auto keep = static_cast<float>(beta), rest = static_cast<float>(1 - beta), least = static_cast<float>(eps);
  const auto per_row = static_cast<float>(1.0 / static_cast<double>(w.rows)), inv_correction = 1.0f / correction;
  for (int64_t j = 0; j < w.cols; ++j) {
    col_state[j] = keep * col_state[j] + rest * (col_sq[j] * per_row + least);
    w.col_factor[j] = 1.0f / std::sqrt(col_state[j] * inv_correction);
  }
  zero(w.col_factor + w.cols, w.stride - w.cols);
  w.row_factor[0] = 1.0f;
  if (!w.matrix) return;
  double total = 0;
  for (int64_t i = 0; i < w.rows; ++i) {
    row_state[i] = keep * row_state[i] + rest * static_cast<float>(w.row_sq[i] * w.per_col + eps);
    total += row_state[i];
  }
  const double mean = total / static_cast<double>(w.rows);
  const auto inv_mean = static_cast<float>(1 / (mean < 1e-38 ? 1e-38 : mean));
  for (int64_t i = 0; i < w.rows; ++i) w.row_factor[i] = 1.0f / std::sqrt(row_state[i] * inv_mean);
}

// What scales a tensor of this sum of squares to an RMS of at most `threshold`.
static inline float clip_factor(const Work& w, double squares) {
  const double excess = std::sqrt(squares / static_cast<double>(w.row->numel)) / w.job->clip_threshold;
  return excess <= 1 ? 1.0f : static_cast<float>(1 / excess);
}

// Sums of the normalised gradient h = g / sqrt(v) before it is clipped: of squares; with kColumns of h^2 and m^2 into col_sum and
// col_sq; with kRows of h and h^2 into row_sum and row_sq.
template <bool kColumns, bool kRows>
double sum_normalised(Work& w) {
  double total = 0;
  if (kColumns) zero(w.col_sum, w.stride), zero(w.col_sq, w.stride);
  if (kRows) zero(w.row_sum, w.rows), zero(w.row_sq, w.rows);
  const F most = set1(kMostByMoment);
  for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
    F all = set1(0.0f);
    for (int r = 0; r < tile.rows; ++r) {
      const Tile line = row_of(tile, r);
      const float *const g = w.gradient + in_workspace(w, line), *const m = w.momentum + in_workspace(w, line);
      const F row_factor = set1(w.row_factor[line.row]);
      F sums = set1(0.0f), squares = set1(0.0f);
      const Ahead mask = ahead(w, line, w.row->lr_mask, w.job->use_8bit ? 1 : 4);
      for (int j = 0; j < tile.width; j += kLanes) {
        mask.fetch(j);
        const int64_t col = line.col + j;
        const F h = mul(load(g + j), at_most(most, mul(row_factor, load(w.col_factor + col)))), square = mul(h, h);
        squares = add(squares, square);
        if (kRows) sums = add(sums, h);
        if (kColumns) {
          const F momentum = load(m + j);
          store(w.col_sum + col, add(load(w.col_sum + col), square));
          store(w.col_sq + col, fma(momentum, momentum, load(w.col_sq + col)));
        }
      }
      all = add(all, squares);
      if (kRows) {
        w.row_sum[line.row] += sum(sums);
        w.row_sq[line.row] += sum(squares);
      }
    }
    total += sum(all);
  });
  return total;
}

// col_sq becomes what m h is multiplied by to be the product of unit columns, times sqrt(rows); a vector is one column.
static inline void prepare_torque(Work& w, float clip) {
  if (!w.matrix) {
    double h = 0, m = 0;
    for (int64_t j = 0; j < w.cols; ++j) {
      h += w.col_sum[j];
      m += w.col_sq[j];
    }
    const double norms = (std::sqrt(m) + 1e-12) * (clip * std::sqrt(h) + 1e-12);
    const auto factor = static_cast<float>(std::sqrt(static_cast<double>(w.cols)) / norms);
    for (int64_t j = 0; j < w.stride; ++j) w.col_sq[j] = factor;
    return;
  }
  const float root = std::sqrt(static_cast<float>(w.rows));
  for (int64_t j = 0; j < w.stride; ++j) {
    w.col_sq[j] = root / ((std::sqrt(w.col_sq[j]) + 1e-12f) * (clip * std::sqrt(w.col_sum[j]) + 1e-12f));
  }
}

enum class Torque { kNone, kCodes, kFloats };

// m <- beta1 m + (1 - beta1) w h, w = (1 + torque) / 2, or 1 without. Leaves the sums of (h - m)^2 in row_sq and col_sum.
template <Torque kTorque>
void advance_momentum(Work& w, float clip) {
  const CameJob& job = *w.job;
  zero(w.col_sum, w.stride);
  zero(w.row_sq, w.rows);
  alignas(64) float staged[kCameTile];
  alignas(64) int8_t staged_codes[kCameTile];
  constexpr bool codes = kTorque == Torque::kCodes;
  const float units = codes ? 127.0f : 1.0f;  // of 1 in a stored torque
  const double rest = 1 - static_cast<double>(w.row->beta1), emphasis = w.row->tail != nullptr ? job.low_rank_emphasis : 1.0;
  const F most = set1(kMostByMoment * clip), beta = set1(w.row->beta1), one = set1(1.0f), minus_one = set1(-1.0f);
  const F rate = set1(static_cast<float>(job.adaptation_rate) * units), past = set1(static_cast<float>(1 - job.adaptation_rate));
  const F share_at_0 = set1(static_cast<float>(rest / 2)), by_torque = set1(static_cast<float>(rest / 2 * emphasis / units));
  const F whole = set1(static_cast<float>(rest)), limit = set1(units);
  for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
    auto* const float_state = static_cast<float*>(w.row->torque);
    auto* const code_state = static_cast<int8_t*>(w.row->torque);
    float* const torque = kTorque == Torque::kFloats ? open(w, tile, float_state, staged) : nullptr;
    int8_t* const torque_codes = codes ? open(w, tile, code_state, staged_codes) : nullptr;
    for (int r = 0; r < tile.rows; ++r) {
      const Tile line = row_of(tile, r);
      const float* const g = w.gradient + in_workspace(w, line);
      float* const m = w.momentum + in_workspace(w, line);
      const F row_factor = set1(w.row_factor[line.row] * clip);
      F squares = set1(0.0f);
      const Ahead history = ahead(w, line, w.row->edge_history, job.use_8bit ? 1 : 4);
      for (int j = 0; j < tile.width; j += kLanes) {
        history.fetch(j);
        const int64_t col = line.col + j;
        const int e = r * tile.width + j;
        const F h = mul(load(g + j), at_most(most, mul(row_factor, load(w.col_factor + col))));
        const F old = load(m + j);
        F share = whole;
        if (kTorque != Torque::kNone) {
          const F cosine = clamp(minus_one, one, mul(mul(old, h), load(w.col_sq + col)));
          const F turned = fma(rate, cosine, mul(past, codes ? to_float(load_i8(torque_codes + e)) : load(torque + e)));
          share = fma(turned, by_torque, share_at_0);
          if (codes) {
            const I code = nearest(clamp(sub(set1(0.0f), limit), limit, turned));
            store_u8(reinterpret_cast<uint8_t*>(torque_codes + e), and_(code, set1(0xFF)));
          } else {
            store(torque + e, turned);
          }
        }
        const F new_m = fma(share, h, mul(beta, old)), gap = sub(h, new_m), square = mul(gap, gap);
        store(m + j, new_m);
        squares = add(squares, square);
        store(w.col_sum + col, add(load(w.col_sum + col), square));
      }
      w.row_sq[line.row] += sum(squares);
    }
    if (codes) close(w, tile, code_state, torque_codes);
    if (kTorque == Torque::kFloats) close(w, tile, float_state, torque);
  });
}

}  // namespace coat::COAT_ISA
