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
  for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
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
          const I sign = and_(as_int(grad), set1(static_cast<int32_t>(~kAbsMask)));
          const F directed = as_float(zero_where(no_bits(as_int(grad), set1(static_cast<int32_t>(kAbsMask))), xor_(as_int(abs(u)), sign)));
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
  const double mean = w.row_sum[row] * w.per_col, variance = w.row_sq[row] * w.per_col - mean * mean;
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
  if (eta == 0 || !w.matrix) {
    for (int64_t i = 0; i < w.rows; ++i) w.row_scale[i] = 1.0f;
    return;
  }
  zero(w.row_sq, w.rows);
  for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
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
  const auto by = static_cast<float>(1 / eta), least = by * by;
  for (int64_t i = 0; i < w.rows; ++i) w.row_scale[i] = by / std::sqrt(std::sqrt(static_cast<float>(w.row_sq[i])) + least);
}

// What a tile of stored codes and its random bytes are copied to.
struct Staging {
  alignas(64) uint8_t codes[kCameTile];
  alignas(64) uint8_t random[kCameTile + 8 + 4 * kCameLanes];
  alignas(64) uint8_t spare[kCameTile + 8 + 4 * kCameLanes];
};

// Adds lr_raise to the mask and, with kSigns, moves it by the agreement of signs, which are kept.
template <bool k8bit, bool kSigns>
void move_mask(const Work& w, const Tile& tile, uint8_t* codes, const uint8_t* random, float* values) {
  const CameRow& row = *w.row;
  const F low = set1(static_cast<float>(w.job->min_lr)), high = set1(static_cast<float>(w.job->max_lr)), none = set1(0.0f);
  const MaskDecoder decoder = mask_decoder(row.first ? *row.new_mask : *row.old_mask);
  const MaskEncoder encoder = mask_encoder(*row.new_mask);
  const int rows = tile.rows, cols = tile.cols, width = tile.width;
  for (int r = 0; r < rows; ++r) {
    const Tile line = row_of(tile, r);
    const float* const g = w.gradient + in_workspace(w, line);
    const float bump = kSigns && !row.first ? w.row_bump[line.row] : 0.0f;
    const F up = set1(row.lr_raise + bump), down = set1(row.lr_raise - bump);
    const int64_t first = in_tensor(w, line);
    uint8_t* const polarity = row.polarity;
    uint8_t* const code = codes + r * width;
    const uint8_t* const chance = random + r * width;
    float* const lr = values + r * width;
    for (int j = 0; j < width; j += kLanes) {
      const F old = k8bit ? decode_mask(decoder, code + j) : load(lr + j);
      F change = up;
      if (kSigns) {
        const M positive = less(none, load(g + j));
        change = choose(same(positive, mask_of(exchange_bits(polarity, first + j, cols - j, bits_of(positive)))), up, down);
      }
      const F value = clamp(low, high, add(old, change));
      store(lr + j, value);
      if (k8bit) store_u8(code + j, encode_mask(encoder, value, chance + j));
    }
  }
}

// Each element's learning rate before lr_factor: `values`, or the state itself where it is float32.
static inline const float* advance_mask(const Work& w, const Tile& tile, Staging& staging, float* values) {
  const CameRow& row = *w.row;
  const bool signs = w.job->phase != CamePhase::kLate, moves = row.first || signs;
  if (!w.job->use_8bit) {
    auto* const state = static_cast<float*>(row.lr_mask);
    values = open(w, tile, state, values);
    if (!moves) return values;
    for (int i = 0; row.first && i < tile.count(); ++i) values[i] = row.lr_start;
    signs ? move_mask<false, true>(w, tile, nullptr, nullptr, values) : move_mask<false, false>(w, tile, nullptr, nullptr, values);
    close(w, tile, state, values);
    return values;
  }
  auto* const state = static_cast<uint8_t*>(row.lr_mask);
  uint8_t* const codes = open(w, tile, state, staging.codes);
  if (!moves) {
    const MaskDecoder decoder = mask_decoder(*row.old_mask);
    for (int i = 0; i < tile.count(); i += kLanes) store(values + i, decode_mask(decoder, codes + i));
    return values;
  }
  if (row.first) memset(codes, kMaskStart, static_cast<size_t>(tile.count()));
  const uint8_t* const random = tile_random_bytes(w, tile, row.mask_key, staging.random, staging.spare);
  signs ? move_mask<true, true>(w, tile, codes, random, values) : move_mask<true, false>(w, tile, codes, random, values);
  close(w, tile, state, codes);
  return values;
}

// Advances the history of edges in the update; what the update is multiplied by goes to `factors`.
template <bool k8bit>
void move_history(const Work& w, const Tile& tile, const Update& update, uint8_t* codes, const uint8_t* random, float* values,
                  float* factors) {
  constexpr float units = k8bit ? kHistoryUnits : 1.0f;  // of 1 in a stored history
  // a tenth of an edge is what the history takes of it
  const F inverse = set1(update.edge_inverse * units * 0.1f), threshold = set1(static_cast<float>(w.job->edge_threshold) * units * 0.1f);
  const F penalty = set1(static_cast<float>(w.job->edge_penalty) / units), one = set1(1.0f), least = set1(0.1f);
  const int rows = tile.rows, width = tile.width;
  for (int r = 0; r < rows; ++r) {
    const Tile line = row_of(tile, r);
    const float* const u = w.momentum + in_workspace(w, line);
    const Beside beside = both_or_none(w, line.row, u);
    const Inside inside = inside_of(w, line);
    uint8_t* const code = codes + r * width;
    const uint8_t* const chance = random + r * width;
    float *const past = values + r * width, *const factor = factors + r * width;
    for_vectors(inside, width, [&](int j, auto whole) COAT_LAMBDA_INLINE {
      const F now = edge(laplacian<whole.value>(inside, u, beside, j), inverse, threshold);
      const F old = k8bit ? to_float(load_u8(code + j)) : load(past + j), kept = mul(old, set1(0.9f));
      const F next = k8bit ? fma(old, kept, now) : add(kept, now);
      store(factor + j, clamp(least, one, fnma(penalty, next, one)));
      if (k8bit) {
        store_u8(code + j, encode_history(next, chance + j));
      } else {
        store(past + j, next);
      }
    });
  }
}

static inline void advance_history(const Work& w, const Tile& tile, const Update& update, Staging& staging, float* factors) {
  if (w.job->use_8bit) {
    auto* const state = static_cast<uint8_t*>(w.row->edge_history);
    uint8_t* const codes = open(w, tile, state, staging.codes);
    const uint8_t* const random = tile_random_bytes(w, tile, w.row->history_key, staging.random, staging.spare);
    move_history<true>(w, tile, update, codes, random, nullptr, factors);
    close(w, tile, state, codes);
    return;
  }
  alignas(64) float staged[kCameTile];
  auto* const state = static_cast<float*>(w.row->edge_history);
  float* const values = open(w, tile, state, staged);
  move_history<false>(w, tile, update, nullptr, nullptr, values, factors);
  close(w, tile, state, values);
}

// p <- p (1 - lr weight_decay) - lr row u
template <bool kAmp, bool kEarly>
void apply_update(Work& w, const Update& update) {
  alignas(64) float rates[kCameTile];
  alignas(64) float factors[kCameTile];
  alignas(64) float params[kCameTile];
  Staging staging;
  const F by_decay = set1(w.row->lr_factor * static_cast<float>(w.job->weight_decay)), none = set1(0.0f), one = set1(1.0f);
  const F most = set1(kMostByInstability);
  for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
    const float* const lr_values = kAmp ? advance_mask(w, tile, staging, rates) : nullptr;
    const bool history = kEarly && w.row->edge_history != nullptr;
    if (history) advance_history(w, tile, update, staging, factors);
    float* const p = open_tile_params(w, tile, params);
    for (int r = 0; r < tile.rows; ++r) {
      const Tile line = row_of(tile, r);
      const float *const g = w.gradient + in_workspace(w, line), *const m = w.momentum + in_workspace(w, line);
      const float keep = kAmp && !kEarly ? w.row_keep[line.row] : 1.0f;
      const F row_factor = set1(w.row_factor[line.row]), by_update = set1(w.row->lr_factor * w.row_scale[line.row] * update.scale * keep);
      const Ahead next = ahead(w, line, w.row->next_grad, dtype_size(w.job->grad_dtype));
      for (int j = 0; j < tile.width; j += kLanes) {
        next.fetch(j);
        const int e = r * tile.width + j;
        F u = load(m + j);
        if (!kEarly) u = mul(u, at_most(most, mul(row_factor, load(w.col_factor + line.col + j))));
        if (kAmp && !kEarly) u = keep_where(less(none, mul(u, load(g + j))), u);
        if (history) u = mul(u, load(factors + e));
        const F lr = kAmp ? load(lr_values + e) : one, old = load(p + e);
        store(p + e, fnma(mul(lr, by_update), u, fnma(mul(lr, by_decay), old, old)));
      }
    }
    close_tile_params(w, tile, p);
  });
}

}  // namespace coat::COAT_ISA
