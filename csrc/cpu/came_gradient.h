// The gradient of the CAME step before its moments: AGR with edge suppression, frequency penalty, rank penalty.
#pragma once

#include <cmath>

#include "came_work.h"

namespace coat::COAT_ISA {

constexpr float kTiny = 1e-30f;

// The rows on either side of the one at x; at the borders x itself.
struct Beside {
  const float *above, *below;
};

COAT_SIMD_INLINE Beside replicated(const Work& w, int64_t row, const float* x) {
  return {row > 0 ? x - w.stride : x, row + 1 < w.rows ? x + w.stride : x};
}
// For the Laplacian: x on both sides, which gives 0, where one is missing.
COAT_SIMD_INLINE Beside both_or_none(const Work& w, int64_t row, const float* x) {
  return row > 0 && row + 1 < w.rows ? Beside{x - w.stride, x + w.stride} : Beside{x, x};
}

// 5-point Laplacian at x + j, each direction where the element has both neighbours.
COAT_SIMD_INLINE F laplacian(const float* x, const Beside& rows, int j, const uint32_t* inner) {
  const F centre = load(x + j), twice = add(centre, centre);
  const F down = add(sub(load(rows.below + j), twice), load(rows.above + j));
  const F across = add(sub(load(x + j + 1), twice), load(x + j - 1));
  return add(down, as_float(and_(as_int(across), load(inner + j))));
}

// |L x| in units of 4 rms(x) where it exceeds the threshold, else 0.
COAT_SIMD_INLINE F edge(F laplacian, F inv_scale, F threshold) {
  const F size = mul(abs(laplacian), inv_scale);
  return keep_where(less(threshold, size), size);
}

// The gradient as float32 into the workspace. Returns the sum of squares.
static inline double load_gradient(Work& w) {
  double total = 0;
  const F factor = set1(static_cast<float>(w.job->grad_factor));
  const DType dtype = w.job->grad_dtype;
  for_tiles(w, [&](const Tile& tile) {
    float* const g = w.gradient + in_workspace(w, tile);
    if (tile.dense()) {
      load_floats(at(w.row->grad, dtype, in_tensor(w, tile)), dtype, tile.count(), tile.count(), g);
    } else {
      for (int r = 0; r < tile.rows; ++r) {
        load_floats(at(w.row->grad, dtype, in_tensor(w, row_of(tile, r))), dtype, tile.cols, tile.width, g + r * tile.width);
      }
    }
    F squares = set1(0.0f);
    for (int i = 0; i < tile.count(); i += kLanes) {
      const F x = mul(load(g + i), factor);
      squares = fma(x, x, squares);
      store(g + i, x);
    }
    total += sum(squares);
  });
  return total;
}

// g (1 - min(a, 1)), a = |g| / sum|g|, times 1 + penalty * edge(g) with kEdges; then `to` is not `from`. Returns the sum of squares.
template <bool kEdges>
double suppress(const Work& w, const float* from, float* to, double squares) {
  const F inv_l1 = set1(static_cast<float>(w.job->inv_grad_l1)), one = set1(1.0f), penalty = set1(static_cast<float>(w.job->edge_penalty));
  const double rms = std::sqrt(squares / static_cast<double>(w.row->numel));
  const F inv_scale = set1(static_cast<float>(1 / (4 * (rms + kTiny)))), threshold = set1(static_cast<float>(w.job->edge_threshold));
  double total = 0;
  for_tiles(w, [&](const Tile& tile) {
    F sums = set1(0.0f);
    for (int r = 0; r < tile.rows; ++r) {
      const Tile line = row_of(tile, r);
      const float* const x = from + in_workspace(w, line);
      float* const out = to + in_workspace(w, line);
      const Beside rows = both_or_none(w, line.row, x);
      for (int j = 0; j < tile.width; j += kLanes) {
        const F g = load(x + j);
        F a = mul(abs(g), inv_l1);
        if (kEdges) {
          a = mul(a, fma(penalty, edge(laplacian(x, rows, j, w.inner + line.col), inv_scale, threshold), one));
        }
        const F kept = mul(g, sub(one, at_most(one, a)));
        sums = fma(kept, kept, sums);
        store(out + j, kept);
      }
    }
    total += sum(sums);
  });
  return total;
}

// x - strength (x - B x), B the 3x3 binomial filter with replicated borders. Returns the sum of squares.
static inline double smooth(const Work& w, const float* from, float* to) {
  const auto strength = static_cast<float>(w.job->frequency_penalty);
  const F keep = set1(1.0f - strength), blur = set1(strength / 16);
  alignas(64) float sums[kCameTile + 2 * kCameLanes];  // of a row and its neighbours, 1 : 2 : 1
  float* const column = sums + kCameLanes;
  double total = 0;
  for_tiles(w, [&](const Tile& tile) {
    F squares = set1(0.0f);
    for (int r = 0; r < tile.rows; ++r) {
      const Tile line = row_of(tile, r);
      const float* const x = from + in_workspace(w, line);
      const Beside rows = replicated(w, line.row, x);
      float* const out = to + in_workspace(w, line);
      for (int j = 0; j < tile.width; j += kLanes) {
        const F centre = load(x + j);
        store(column + j, add(add(load(rows.above + j), load(rows.below + j)), add(centre, centre)));
      }
      const auto beside = [&](int64_t j) { return rows.above[j] + rows.below[j] + (x[j] + x[j]); };
      column[-1] = line.col > 0 ? beside(-1) : column[0];
      column[tile.cols] = line.col + tile.cols < w.cols ? beside(tile.cols) : column[tile.cols - 1];
      if (!tile.dense()) column[tile.width] = 0.0f;  // read below; memory's garbage may be a NaN, which taking it out of the sum leaves
      for (int j = 0; j < tile.width; j += kLanes) {
        const F centre = load(column + j);
        const F blurred = add(add(load(column + j - 1), load(column + j + 1)), add(centre, centre));
        const F y = fma(blur, blurred, mul(keep, load(x + j)));
        squares = fma(y, y, squares);
        store(out + j, y);
      }
      for (int j = tile.cols; j < tile.width; ++j) {
        total -= static_cast<double>(out[j]) * out[j];
        out[j] = 0.0f;
      }
    }
    total += sum(squares);
  });
  return total;
}

// out[r, ..] += scale * sum_k a[r, k] b[k, ..] for kRows rows and kVectors vectors.
template <int kRows, int kVectors>
COAT_SIMD_INLINE void add_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, F scale, float* out,
                                  int64_t out_stride) {
  F acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = set1(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    F right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_stride + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const F left = set1(a[r * a_stride + k]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(left, right[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* const to = out + r * out_stride + v * kLanes;
      store(to, fma(scale, acc[r][v], load(to)));
    }
  }
}

constexpr int kProductRows = kLanes == 16 ? 8 : 4;  // as many sums as registers hold

template <int kVectors>
void add_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t depth, F scale, float* out,
              int64_t out_stride) {
  int64_t r = 0;
  for (; r + kProductRows <= rows; r += kProductRows) {
    add_product<kProductRows, kVectors>(a + r * a_stride, a_stride, b, b_stride, depth, scale, out + r * out_stride, out_stride);
  }
  for (; r < rows; ++r) add_product<1, kVectors>(a + r * a_stride, a_stride, b, b_stride, depth, scale, out + r * out_stride, out_stride);
}

// g += strength * rms(g) * (P W, or W P where W has more rows than columns), W the parameter.
static inline void add_tail(Work& w, double squares) {
  const double rms = std::sqrt(squares / static_cast<double>(w.row->numel));
  const F scale = set1(static_cast<float>(w.job->rank_penalty_strength * rms));
  const DType dtype = w.job->param_dtype;
  const void* const param = w.row->param;
  constexpr int kBlockCols = 2 * kLanes;
  if (w.rows <= w.cols) {
    float* const block = w.tail;  // [rows, kBlockCols] of W
    for (int64_t j = 0; j < w.stride; j += kBlockCols) {
      const int64_t left = w.cols - j;
      const int cols = static_cast<int>(left < kBlockCols ? left : kBlockCols);
      for (int64_t k = 0; k < w.rows; ++k) {
        load_floats(at(param, dtype, k * w.cols + j), dtype, cols, kBlockCols, block + k * kBlockCols);
      }
      if (w.stride - j >= kBlockCols) {
        add_rows<2>(w.row->tail, w.rows, block, kBlockCols, w.rows, w.rows, scale, w.gradient + j, w.stride);
      } else {
        add_rows<1>(w.row->tail, w.rows, block, kBlockCols, w.rows, w.rows, scale, w.gradient + j, w.stride);
      }
    }
    return;
  }
  float* const projector = w.tail;  // [cols, stride], padded with zeros
  for (int64_t k = 0; k < w.cols; ++k) {
    load_floats(w.row->tail + k * w.cols, DType::kFloat32, static_cast<int>(w.cols), static_cast<int>(w.stride), projector + k * w.stride);
  }
  float* const block = projector + w.cols * w.stride;  // [kProductRows, cols] of W
  for (int64_t row = 0; row < w.rows; row += kProductRows) {
    const int64_t rows = w.rows - row < kProductRows ? w.rows - row : kProductRows;
    const int count = static_cast<int>(rows * w.cols);
    const ParamStorage params = params_of(w);
    const float* const left = open_params(params, row * w.cols, count, count, block);
    float* const out = w.gradient + row * w.stride;
    int64_t j = 0;
    for (; j + kBlockCols <= w.stride; j += kBlockCols) {
      add_rows<2>(left, w.cols, projector + j, w.stride, rows, w.cols, scale, out + j, w.stride);
    }
    if (j < w.stride) add_rows<1>(left, w.cols, projector + j, w.stride, rows, w.cols, scale, out + j, w.stride);
  }
}

// Everything before the moments; `w.gradient` holds the result. `w.momentum` is scratch.
static inline void shape_gradient(Work& w) {
  const CameJob& job = *w.job;
  double squares = load_gradient(w);
  if (!job.amp) return;
  const bool smoothed = job.frequency_penalty > 0 && w.edges;
  if (job.edge_suppression && w.edges) {
    squares = suppress<true>(w, w.gradient, w.momentum, squares);
    swap_workspaces(&w);
  } else {
    squares = suppress<false>(w, w.gradient, w.gradient, squares);
  }
  if (smoothed) {
    squares = smooth(w, w.gradient, w.momentum);
    swap_workspaces(&w);
  }
  if (w.row->tail != nullptr && job.rank_penalty_strength != 0) add_tail(w, squares);
}

}  // namespace coat::COAT_ISA
