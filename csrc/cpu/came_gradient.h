// The gradient of the CAME step before its moments: AGR with edge suppression, frequency penalty, rank penalty.
#pragma once

#include <cmath>
#include <type_traits>

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

// Where the vectors of a line lie in their row.
struct Inside {
  int first, last;                                                     // of the row's elements, counted from the line's beginning
  bool whole(int j) const { return j > first && j + kLanes <= last; }  // all elements have both neighbours
  M has_left(int j) const { return less(set1(first - j), iota()); }
  M has_right(int j) const { return less(iota(), set1(last - j)); }
  M valid(int j) const { return less(iota(), set1(last - j + 1)); }
};

COAT_SIMD_INLINE Inside inside_of(const Work& w, const Tile& line) {
  const int64_t last = w.cols - 1 - line.col;
  return {line.col == 0 ? 0 : -1, static_cast<int>(last < kCameTile ? last : kCameTile)};
}

// pass(j, whole) over the vectors of a line, `whole` a constant type: what happens at the borders costs the others nothing.
template <typename Pass>
COAT_SIMD_INLINE void for_vectors(const Inside& inside, int width, Pass pass) {
  int j = 0;
  for (; j < width && !inside.whole(j); j += kLanes) pass(j, std::false_type{});
  for (; inside.whole(j) && j < width; j += kLanes) pass(j, std::true_type{});
  for (; j < width; j += kLanes) pass(j, std::false_type{});
}

// 5-point Laplacian at x + j, each direction where the element has both neighbours.
template <bool kWhole>
COAT_SIMD_INLINE F laplacian(const Inside& inside, const float* x, const Beside& rows, int j) {
  const F centre = load(x + j), down = add(load(rows.above + j), load(rows.below + j)), across = add(load(x + j - 1), load(x + j + 1));
  if (kWhole) return fnma(set1(4.0f), centre, add(down, across));
  const F twice = add(centre, centre);
  return add(sub(down, twice), keep_where(inside.has_left(j), keep_where(inside.has_right(j), sub(across, twice))));
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
  for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
    float* const g = w.gradient + in_workspace(w, tile);
    const float* from = g;
    if (tile.dense() && dtype == DType::kFloat32) {
      from = static_cast<const float*>(w.row->grad) + in_tensor(w, tile);
    } else if (tile.dense()) {
      load_floats(at(w.row->grad, dtype, in_tensor(w, tile)), dtype, tile.count(), tile.count(), g);
    } else {
      for (int r = 0; r < tile.rows; ++r) {
        load_floats(at(w.row->grad, dtype, in_tensor(w, row_of(tile, r))), dtype, tile.cols, tile.width, g + r * tile.width);
      }
    }
    F squares = set1(0.0f);
    for (int i = 0; i < tile.count(); i += kLanes) {
      const F x = mul(load(from + i), factor);
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
  for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
    F sums = set1(0.0f);
    for (int r = 0; r < tile.rows; ++r) {
      const Tile line = row_of(tile, r);
      const float* const x = from + in_workspace(w, line);
      float* const out = to + in_workspace(w, line);
      const Beside rows = both_or_none(w, line.row, x);
      const Inside inside = inside_of(w, line);
      const Ahead params = ahead(w, line, w.row->param, dtype_size(w.job->param_dtype));
      for_vectors(inside, tile.width, [&](int j, auto whole) COAT_LAMBDA_INLINE {
        params.fetch(j);
        const F g = load(x + j);
        F a = mul(abs(g), inv_l1);
        if (kEdges) a = mul(a, fma(penalty, edge(laplacian<whole.value>(inside, x, rows, j), inv_scale, threshold), one));
        const F kept = mul(g, sub(one, at_most(one, a)));
        sums = fma(kept, kept, sums);
        store(out + j, kept);
      });
    }
    total += sum(sums);
  });
  return total;
}

// x - strength (x - B x), B the 3x3 binomial filter with replicated borders. Returns the sum of squares.
static inline double smooth(const Work& w, const float* from, float* to) {
  const auto strength = static_cast<float>(w.job->frequency_penalty);
  const F keep = set1(1.0f - strength), blur = set1(strength / 16);
  double total = 0;
  for_tiles(w, [&](const Tile& tile) COAT_LAMBDA_INLINE {
    F squares = set1(0.0f);
    for (int r = 0; r < tile.rows; ++r) {
      const Tile line = row_of(tile, r);
      const float* const x = from + in_workspace(w, line);
      const Beside rows = replicated(w, line.row, x);
      float* const out = to + in_workspace(w, line);
      const Inside inside = inside_of(w, line);
      // 1 : 2 : 1 of a column's three elements
      const auto column = [&](int j) COAT_LAMBDA_INLINE {
        const F centre = load(x + j);
        return add(add(load(rows.above + j), load(rows.below + j)), add(centre, centre));
      };
      // Columns are summed once and shifted: most loads beside an aligned vector straddle two lines of cache.
      F before = column(-kLanes), centre = column(0);
      const Ahead momentum = ahead(w, line, w.row->exp_avg, w.job->use_8bit ? 1 : 4);
      for_vectors(inside, tile.width, [&](int j, auto whole) COAT_LAMBDA_INLINE {
        momentum.fetch(j);
        const F after = column(j + kLanes);
        F left = from_left(before, centre), right = from_right(centre, after);
        if (!whole.value) {
          left = choose(inside.has_left(j), left, centre);
          right = choose(inside.has_right(j), right, centre);
        }
        F y = fma(blur, add(add(left, right), add(centre, centre)), mul(keep, load(x + j)));
        if (!whole.value) y = keep_where(inside.valid(j), y);
        squares = fma(y, y, squares);
        store(out + j, y);
        before = centre;
        centre = after;
      });
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

// Rows and vectors whose sums registers hold: a load of b serves kProductRows sums, one of a kProductVectors.
constexpr int kProductRows = kLanes == 16 ? 4 : 2, kProductVectors = 4, kBlockCols = kProductVectors * kLanes;

template <int kVectors>
void add_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t depth, F scale, float* out,
              int64_t out_stride) {
  constexpr int kRows = kProductRows * kProductVectors / kVectors;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    add_product<kRows, kVectors>(a + r * a_stride, a_stride, b, b_stride, depth, scale, out + r * out_stride, out_stride);
  }
  for (; r < rows; ++r) add_product<1, kVectors>(a + r * a_stride, a_stride, b, b_stride, depth, scale, out + r * out_stride, out_stride);
}

// The same for `width` columns, a multiple of kLanes up to kBlockCols.
static inline void add_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t width, int64_t rows, int64_t depth,
                             F scale, float* out, int64_t out_stride) {
  if (width >= kBlockCols) return add_rows<kProductVectors>(a, a_stride, b, b_stride, rows, depth, scale, out, out_stride);
  for (int64_t j = 0; j < width; j += kLanes) add_rows<1>(a, a_stride, b + j, b_stride, rows, depth, scale, out + j, out_stride);
}

// g += scale * (P W), W with no more rows than columns.
static inline void add_tail_wide(Work& w, F scale) {
  const DType dtype = w.job->param_dtype;
  float* const block = w.tail;  // [rows, kBlockCols] of W: its own rows may lie a multiple of 4096 bytes apart, all in one set of L1
  for (int64_t j = 0; j < w.stride; j += kBlockCols) {
    const int64_t left = w.cols - j;
    const int cols = static_cast<int>(left < kBlockCols ? left : kBlockCols);
    for (int64_t k = 0; k < w.rows; ++k) {
      const void* const from = at(w.row->param, dtype, k * w.cols + j);
      float* const to = block + k * kBlockCols;
      if (dtype == DType::kFloat32 && cols == kBlockCols) {
        for (int v = 0; v < kBlockCols; v += kLanes) store(to + v, load(static_cast<const float*>(from) + v));
      } else {
        load_floats(from, dtype, cols, kBlockCols, to);
      }
    }
    add_block(w.row->tail, w.rows, block, kBlockCols, w.stride - j, w.rows, w.rows, scale, w.gradient + j, w.stride);
  }
}

// g += scale * (W P), W with more rows than columns.
static inline void add_tail_narrow(Work& w, F scale) {
  float* const projector = w.tail;  // [cols, stride], padded with zeros
  for (int64_t k = 0; k < w.cols; ++k) {
    load_floats(w.row->tail + k * w.cols, DType::kFloat32, static_cast<int>(w.cols), static_cast<int>(w.stride), projector + k * w.stride);
  }
  constexpr int64_t kRows = 16;
  float* const block = projector + w.cols * w.stride;  // [kRows, cols] of W
  const ParamStorage params = params_of(w);
  for (int64_t row = 0; row < w.rows; row += kRows) {
    const int64_t rows = w.rows - row < kRows ? w.rows - row : kRows;
    const int count = static_cast<int>(rows * w.cols);
    const float* const left = open_params(params, row * w.cols, count, count, block);
    for (int64_t j = 0; j < w.stride; j += kBlockCols) {
      add_block(left, w.cols, projector + j, w.stride, w.stride - j, rows, w.cols, scale, w.gradient + row * w.stride + j, w.stride);
    }
  }
}

// g += strength * rms(g) * the parameter's tail directions.
static inline void add_tail(Work& w, double squares) {
  const double rms = std::sqrt(squares / static_cast<double>(w.row->numel));
  const F scale = set1(static_cast<float>(w.job->rank_penalty_strength * rms));
  w.rows <= w.cols ? add_tail_wide(w, scale) : add_tail_narrow(w, scale);
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
