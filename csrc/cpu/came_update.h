// The update of the CAME step: its size, the learning rate mask, Grams' signs or the cautious mask, and the parameter.
#pragma once

#include "came_gradient.h"
#include "came_moments.h"

namespace coat::COAT_ISA {

// What makes the update of the momentum, found over the whole tensor.
struct Update {
  float scale;         // clipping, and 1 / the share of elements kept by the cautious mask
  float edge_inverse;  // 1 / (4 rms), in the units of w.momentum
};

struct UpdateSums {
  double squares;         // of u
  double signed_squares;  // of |u| sign(g)
  double kept;            // elements with u g > 0
};

// u = m / sqrt(r), before it is clipped. In the early phase |u| sign(g) takes the momentum's place.
template <bool kEarly>
UpdateSums sum_update(Work& w) {
  UpdateSums total{};
  const F most = set1(kMostByInstability), none = set1(0.0f), one = set1(1.0f);
  for_tiles(w, [&](const Tile& tile) {
    F squares = none, other = none;
    for (int r = 0; r < tile.rows; ++r) {
      const Tile line = row_of(tile, r);
      const float* const g = w.gradient + in_workspace(w, line);
      float* const m = w.momentum + in_workspace(w, line);
      const F row_factor = set1(w.row_factor[line.row]);
      for (int j = 0; j < tile.width; j += kLanes) {
        const F grad = load(g + j), u = mul(load(m + j), at_most(most, mul(row_factor, load(w.col_factor + line.col + j))));
        squares = fma(u, u, squares);
        if (kEarly) {
          const F size = abs(u), directed = choose(less(none, grad), size, keep_where(less(grad, none), sub(none, size)));
          other = fma(directed, directed, other);
          store(m + j, directed);
        } else {
          other = add(other, keep_where(less(none, mul(u, grad)), one));
        }
      }
    }
    total.squares += sum(squares);
    (kEarly ? total.signed_squares : total.kept) += sum(other);
  });
  return total;
}

// A NaN anywhere makes the scale NaN, and the whole update with it, as sums over the tensor do in the reference.
template <bool kEarly>
Update measure_update(Work& w) {
  const UpdateSums sums = sum_update<kEarly>(w);
  const auto numel = static_cast<double>(w.row->numel);
  Update update{clip_factor(w, sums.squares), 0.0f};
  if (kEarly) {
    const double rms = update.scale * std::sqrt(sums.signed_squares / numel);
    update.edge_inverse = static_cast<float>(update.scale / (4 * (rms + kTiny)));
  } else {
    const double kept = sums.kept / numel;
    update.scale = static_cast<float>(update.scale / (kept < 1e-3 ? 1e-3 : kept));
  }
  return update;
}

// Of a row, by its sums; what float32 sums cannot tell from a constant row is 0.
static inline double row_variance(const Work& w, int64_t row) {
  const auto cols = static_cast<double>(w.cols);
  const double mean = w.row_sum[row] / cols, variance = w.row_sq[row] / cols - mean * mean;
  return variance <= 4e-6 * mean * mean ? 0 : variance;
}

// Per row: the share of the update that background keeps.
static inline void find_background(Work& w) {
  double total = 0;
  for (int64_t i = 0; i < w.rows; ++i) {
    const double variance = row_variance(w, i);
    w.row_keep[i] = static_cast<float>(variance);
    total += variance;
  }
  const auto least = static_cast<float>(1e-2 * total / static_cast<double>(w.rows));
  for (int64_t i = 0; i < w.rows; ++i) w.row_keep[i] = w.row_keep[i] < least ? 0.5f : 1.0f;
}

// Per row: lr_bump by the variance of h, of which row_sum and row_sq hold the sums, and its moving average.
static inline void find_bumps(Work& w, float clip) {
  const auto bump = static_cast<float>(w.job->lr_bump), preservation = static_cast<float>(w.job->detail_preservation);
  for (int64_t i = 0; i < w.rows; ++i) {
    w.row_bump[i] = bump;
    if (w.row->row_variance == nullptr) continue;
    auto variance = static_cast<float>(row_variance(w, i) * clip * clip);
    if (!w.row->first) variance = 0.9f * from_bfloat16(w.row->row_variance[i]) + 0.1f * variance;
    w.row->row_variance[i] = to_bfloat16(variance);
    const float factor = variance * preservation;
    w.row_bump[i] = bump * (factor > 1.5f ? 1.5f : factor > 0.5f ? factor : 0.5f);
  }
}

// Per row: 1 / (eta sqrt(|p_row| + 1 / eta^2)).
static inline void find_row_scales(Work& w) {
  const double eta = w.job->eta;
  alignas(64) float staged[kCameTile];
  zero(w.row_sq, w.rows);
  if (eta > 0 && w.matrix) {
    for_tiles(w, [&](const Tile& tile) {
      const float* const p = open_tile_params(w, tile, staged);
      for (int r = 0; r < tile.rows; ++r) {
        F squares = set1(0.0f);
        for (int j = 0; j < tile.width; j += kLanes) {
          const F x = load(p + r * tile.width + j);
          squares = fma(x, x, squares);
        }
        w.row_sq[tile.row + r] += sum(squares);
      }
    });
  }
  for (int64_t i = 0; i < w.rows; ++i) {
    w.row_scale[i] = eta > 0 && w.matrix ? static_cast<float>(1 / (eta * std::sqrt(std::sqrt(w.row_sq[i]) + 1 / (eta * eta)))) : 1.0f;
  }
}

// What a tile of stored codes and its random bytes are copied to.
struct Staging {
  alignas(64) uint8_t codes[kCameTile];
  alignas(64) uint8_t random[kCameTile + 8 + 4 * kCameLanes];
  alignas(64) uint8_t spare[kCameTile + 8 + 4 * kCameLanes];
};

// Adds the agreement of signs to the mask's values of a tile, and keeps the signs.
static inline void move_mask(const Work& w, const Tile& tile, float* values) {
  const CameRow& row = *w.row;
  const F raise = set1(row.lr_raise), low = set1(static_cast<float>(w.job->min_lr)), high = set1(static_cast<float>(w.job->max_lr));
  const F none = set1(0.0f);
  const bool signs = w.job->phase != CamePhase::kLate;
  for (int r = 0; r < tile.rows; ++r) {
    const Tile line = row_of(tile, r);
    const float* const g = w.gradient + in_workspace(w, line);
    float* const value = values + r * tile.width;
    const F bump = set1(signs && !row.first ? w.row_bump[line.row] : 0.0f);
    const int64_t first = in_tensor(w, line);
    for (int j = 0; j < tile.width; j += kLanes) {
      F moved = add(load(value + j), raise);
      if (signs) {
        const int n = tile.cols - j < kLanes ? tile.cols - j : kLanes;
        const M positive = less(none, load(g + j));
        const M agrees = same(positive, mask_of(load_bits(row.polarity, first + j, n)));
        moved = add(moved, choose(agrees, bump, sub(none, bump)));
        store_bits(row.polarity, first + j, n, bits_of(positive));
      }
      store(value + j, clamp(low, high, moved));
    }
  }
}

// Each element's learning rate before lr_factor: `values`, or the state itself where it is float32.
static inline const float* advance_mask(const Work& w, const Tile& tile, Staging& staging, float* values) {
  const CameJob& job = *w.job;
  const CameRow& row = *w.row;
  auto* const state = static_cast<uint8_t*>(row.lr_mask);
  uint8_t* codes = nullptr;
  if (job.use_8bit) {
    codes = open(w, tile, state, staging.codes);
    if (!row.first) decode_table(row.old_mask, codes, tile.count(), values);
  } else {
    values = open(w, tile, static_cast<float*>(row.lr_mask), values);
  }
  if (row.first) {
    for (int i = 0; i < tile.count(); ++i) values[i] = row.lr_start;
  } else if (job.phase == CamePhase::kLate) {
    return values;
  }
  move_mask(w, tile, values);
  if (job.use_8bit) {
    const uint8_t* const random = tile_random_bytes(w, tile, row.mask_key, staging.random, staging.spare);
    encode_mask(row.mask, values, tile.count(), random, codes);
    close(w, tile, state, codes);
  } else {
    close(w, tile, static_cast<float*>(row.lr_mask), values);
  }
  return values;
}

// Advances edge_history; what the update is multiplied by goes to `factors`.
static inline void advance_history(const Work& w, const Tile& tile, const Update& update, Staging& staging, float* factors) {
  const CameJob& job = *w.job;
  alignas(64) float values[kCameTile];
  float* history = values;
  uint8_t* codes = nullptr;
  if (job.use_8bit) {
    codes = open(w, tile, static_cast<uint8_t*>(w.row->edge_history), staging.codes);
    decode_history(codes, tile.count(), history);
  } else {
    history = open(w, tile, static_cast<float*>(w.row->edge_history), values);
  }
  const F inverse = set1(update.edge_inverse), threshold = set1(static_cast<float>(job.edge_threshold));
  const F penalty = set1(static_cast<float>(job.edge_penalty)), one = set1(1.0f), least = set1(0.1f);
  for (int r = 0; r < tile.rows; ++r) {
    const Tile line = row_of(tile, r);
    const float* const u = w.momentum + in_workspace(w, line);
    const Beside rows = both_or_none(w, line.row, u);
    float *const past = history + r * tile.width, *const factor = factors + r * tile.width;
    for (int j = 0; j < tile.width; j += kLanes) {
      const F now = edge(laplacian(u, rows, j, w.inner + line.col), inverse, threshold);
      const F next = fma(set1(0.1f), now, mul(set1(0.9f), load(past + j)));
      store(past + j, next);
      store(factor + j, clamp(least, one, fnma(penalty, next, one)));
    }
  }
  if (job.use_8bit) {
    const uint8_t* const random = tile_random_bytes(w, tile, w.row->history_key, staging.random, staging.spare);
    encode_history(history, tile.count(), random, codes);
    close(w, tile, static_cast<uint8_t*>(w.row->edge_history), codes);
  } else {
    close(w, tile, static_cast<float*>(w.row->edge_history), history);
  }
}

// p <- p (1 - lr weight_decay) - lr row u
template <bool kAmp, bool kEarly>
void apply_update(Work& w, const Update& update) {
  alignas(64) float rates[kCameTile];
  alignas(64) float factors[kCameTile];
  alignas(64) float params[kCameTile];
  Staging staging;
  const F lr_factor = set1(w.row->lr_factor), decay = set1(static_cast<float>(w.job->weight_decay)), none = set1(0.0f);
  const F most = set1(kMostByInstability);
  for_tiles(w, [&](const Tile& tile) {
    const float* const lr_values = kAmp ? advance_mask(w, tile, staging, rates) : nullptr;
    const bool history = kEarly && w.row->edge_history != nullptr;
    if (history) advance_history(w, tile, update, staging, factors);
    float* const p = open_tile_params(w, tile, params);
    for (int r = 0; r < tile.rows; ++r) {
      const Tile line = row_of(tile, r);
      const float *const g = w.gradient + in_workspace(w, line), *const m = w.momentum + in_workspace(w, line);
      const float keep = kAmp && !kEarly ? w.row_keep[line.row] : 1.0f;
      const F row_factor = set1(w.row_factor[line.row]), scale = set1(update.scale * keep), row_scale = set1(w.row_scale[line.row]);
      for (int j = 0; j < tile.width; j += kLanes) {
        const int e = r * tile.width + j;
        F u = load(m + j);
        if (!kEarly) u = mul(u, at_most(most, mul(row_factor, load(w.col_factor + line.col + j))));
        if (kAmp && !kEarly) u = keep_where(less(none, mul(u, load(g + j))), u);
        u = mul(u, scale);
        if (history) u = mul(u, load(factors + e));
        const F lr = kAmp ? mul(load(lr_values + e), lr_factor) : lr_factor;
        const F old = load(p + e);
        store(p + e, fnma(mul(lr, row_scale), u, fnma(mul(lr, decay), old, old)));
      }
    }
    close_tile_params(w, tile, p);
  });
}

}  // namespace coat::COAT_ISA
