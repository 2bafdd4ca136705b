// One tensor of the CAME step under way: its float32 workspaces, and the tiles that its passes walk.
//
// A workspace has the tensor's rows, each padded with zeros to whole vectors, so that passes over rows have no ragged ends; the
// stored arrays have no padding and are copied tile by tile where rows do not fill vectors.
#pragma once

#include "came_8bit.h"
#include "came_simd.h"
#include "params.h"

namespace coat::COAT_ISA {

struct Work {
  const CameJob* job;
  const CameRow* row;
  int64_t rows, cols, stride;
  double per_col;                        // 1 / cols
  bool matrix, edges;                    // 2-D; with more than 2 rows and columns
  float *gradient, *momentum;            // whole tensor
  float *col_factor, *col_sum, *col_sq;  // [stride]
  double *row_sum, *row_sq;              // [rows]
  float *row_factor, *row_scale;         // [rows]: of the moments; of the parameter (eta)
  float *row_bump, *row_keep;            // [rows]: of lr_bump; of the update (background)
  float* tail;                           // [n, padded n] or [n, n] and a block of columns
};

// Rows [row, row + rows) whole, or columns [col, col + cols) of a single row; `width` is cols with the padding.
struct Tile {
  int64_t row, col;
  int rows, cols, width;
  int count() const { return rows * width; }
  bool dense() const { return cols == width; }
};

COAT_SIMD_INLINE int64_t padded_to_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
COAT_SIMD_INLINE int64_t in_workspace(const Work& w, const Tile& tile) { return tile.row * w.stride + tile.col; }
COAT_SIMD_INLINE int64_t in_tensor(const Work& w, const Tile& tile) { return tile.row * w.cols + tile.col; }
COAT_SIMD_INLINE Tile row_of(const Tile& tile, int r) { return {tile.row + r, tile.col, 1, tile.cols, tile.width}; }

// An array that a later pass reads, brought to L2 by one that has more to compute than to load: line by line, a vector at a time.
struct Ahead {
  const char* data;
  int size;  // of an element
  // inlined by force: GCC 12 takes a function that only fetches for one without effect, and drops the call
  __attribute__((always_inline)) void fetch(int j) const { __builtin_prefetch(data + j * size, 0, 2); }
};

COAT_SIMD_INLINE Ahead ahead(const Work& w, const Tile& line, const void* array, int size) {
  return {static_cast<const char*>(array == nullptr ? w.row->grad : array) + in_tensor(w, line) * size, size};
}

// Down the rows first: three rows of a tile and the sums of its columns fit L1 together. One call of `pass`, so that it is inlined and
// what it reads of the pass's constants stays in registers.
template <typename Pass>
COAT_SIMD_INLINE void for_tiles(const Work& w, Pass pass) {
  const int64_t row_step = w.stride <= kCameTile ? kCameTile / w.stride : 1, col_step = w.stride <= kCameTile ? w.cols : kCameTile;
  for (int64_t col = 0; col < w.cols; col += col_step) {
    const auto cols = static_cast<int>(w.cols - col < col_step ? w.cols - col : col_step);
    for (int64_t row = 0; row < w.rows; row += row_step) {
      const auto rows = static_cast<int>(w.rows - row < row_step ? w.rows - row : row_step);
      pass(Tile{row, col, rows, cols, static_cast<int>(padded_to_lanes(cols))});
    }
  }
}

// A tile of a stored array: where it is if it needs no padding, else a copy in `staged`, zeros in the padding.
template <typename T>
COAT_SIMD_INLINE T* open(const Work& w, const Tile& tile, T* array, T* staged) {
  if (tile.dense()) return array + in_tensor(w, tile);
  for (int r = 0; r < tile.rows; ++r) {
    T* const to = staged + r * tile.width;
    memcpy(to, array + in_tensor(w, row_of(tile, r)), static_cast<size_t>(tile.cols) * sizeof(T));
    memset(to + tile.cols, 0, static_cast<size_t>(tile.width - tile.cols) * sizeof(T));
  }
  return staged;
}

// Stores what `open` returned, or `staged` values written in its stead.
template <typename T>
COAT_SIMD_INLINE void close(const Work& w, const Tile& tile, T* array, const T* values) {
  if (tile.dense()) return;
  for (int r = 0; r < tile.rows; ++r) {
    memcpy(array + in_tensor(w, row_of(tile, r)), values + r * tile.width, static_cast<size_t>(tile.cols) * sizeof(T));
  }
}

COAT_SIMD_INLINE ParamStorage params_of(const Work& w) {
  return {w.row->param, w.job->param_dtype, w.job->param_rounding, nullptr, w.row->param_key};
}

static inline float* open_tile_params(const Work& w, const Tile& tile, float* staged) {
  const ParamStorage params = params_of(w);
  if (tile.dense()) return open_params(params, in_tensor(w, tile), tile.count(), tile.count(), staged);
  for (int r = 0; r < tile.rows; ++r) {
    open_params(params, in_tensor(w, row_of(tile, r)), tile.cols, tile.width, staged + r * tile.width);
  }
  return staged;
}

static inline void close_tile_params(const Work& w, const Tile& tile, const float* values) {
  const ParamStorage params = params_of(w);
  if (tile.dense()) return close_params(params, in_tensor(w, tile), tile.count(), values);
  for (int r = 0; r < tile.rows; ++r) close_params(params, in_tensor(w, row_of(tile, r)), tile.cols, values + r * tile.width);
}

// Lays a tensor's workspaces out in `memory`, of came_workspace(rows, cols).total() floats.
static inline Work make_work(const CameJob& job, const CameRow& row, float* memory) {
  Work w{};
  w.job = &job;
  w.row = &row;
  w.rows = row.rows;
  w.cols = row.cols;
  w.stride = padded_to_lanes(row.cols);
  w.per_col = 1.0 / static_cast<double>(row.cols);
  w.matrix = row.exp_avg_sq_row != nullptr;
  w.edges = w.matrix && w.rows > 2 && w.cols > 2;
  const CameWorkspaceSizes sizes = came_workspace(row.rows, row.cols);
  const auto take = [&memory](int64_t floats) {
    float* const taken = memory;
    memory += floats;
    return taken;
  };
  w.gradient = take(sizes.whole) + kCameLanes;
  w.momentum = take(sizes.whole) + kCameLanes;
  w.col_factor = take(sizes.cols);
  w.col_sum = take(sizes.cols);
  w.col_sq = take(sizes.cols);
  w.row_sum = reinterpret_cast<double*>(take(sizes.rows));
  w.row_sq = reinterpret_cast<double*>(take(sizes.rows));
  w.row_factor = take(sizes.rows);
  w.row_scale = take(sizes.rows);
  w.row_bump = take(sizes.rows);
  w.row_keep = take(sizes.rows);
  w.tail = memory;
  return w;
}

static inline void swap_workspaces(Work* w) {
  float* const gradient = w->gradient;
  w->gradient = w->momentum;
  w->momentum = gradient;
}

COAT_SIMD_INLINE void zero(float* x, int64_t n) { memset(x, 0, static_cast<size_t>(n) * sizeof(float)); }
COAT_SIMD_INLINE void zero(double* x, int64_t n) { memset(x, 0, static_cast<size_t>(n) * sizeof(double)); }

}  // namespace coat::COAT_ISA
