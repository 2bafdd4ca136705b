// The fused CAME step: arXiv 2307.02047, and Automagic_CameAMP_Improved_8Bit. Formulas: ops/came_8bit/reference.py.
//
// Sums over rows, columns and the whole are needed one after the other, so a tensor is walked in passes by one team: a thread block each
// for small tensors, side by side, and the whole GPU, one tensor after the other, for large ones. The gradient and the momentum lie in
// float32 workspaces meanwhile, which for a LoRA factor stay in L2.
#include "came_8bit.h"

namespace coat {

// One tensor under way.
struct Came {
  const CameArguments& job;
  const CameRow& row;
  const CameNumbers& numbers;
  CameShared& shared;
  Team& team;
  int step, block_shift;
  int64_t rows, cols, numel;
  bool matrix, edges, early, signs, first;
  float *gradient = nullptr, *momentum = nullptr;  // whole tensor
  float clip = 1;                                  // of h

  // The caller synchronizes.
  __device__ void lay_out(float* memory) {
    const auto take = [&memory](int64_t floats) {
      float* const taken = memory;
      memory += floats;
      return taken;
    };
    gradient = take(numel);
    momentum = take(numel);
    float* const partial = take(cols > team.size() ? cols : team.size());
    float *const col_v = take(cols), *const col_r = take(cols), *const col_m = take(cols), *const col_h = take(cols);
    float *const row_v = take(rows), *const row_r = take(rows);
    float *const row_scale = take(rows), *const row_bump = take(rows), *const row_keep = take(rows);
    if (threadIdx.x == 0) shared.at = {partial, col_v, col_r, col_m, col_h, row_v, row_r, row_scale, row_bump, row_keep};
  }

  __device__ float rms(double squares) const { return static_cast<float>(sqrt(squares / static_cast<double>(numel))); }

  // What scales a tensor of this sum of squares to an RMS of at most the threshold. NaN stays.
  __device__ float clip_of(double squares) const {
    const float excess = rms(squares) / job.clip_threshold;
    return excess <= 1 ? 1.0f : 1 / excess;
  }

  // 5-point Laplacian, each direction where the element has both neighbours.
  __device__ float laplacian(const float* x, int64_t i, int64_t r, int64_t c) const {
    float sum = 0;
    if (r > 0 && r + 1 < rows) sum += x[i + cols] - 2 * x[i] + x[i - cols];
    if (c > 0 && c + 1 < cols) sum += x[i + 1] - 2 * x[i] + x[i - 1];
    return sum;
  }

  // |L x| in the unit of x's RMS whose inverse this is, where it counts as an edge.
  __device__ float edge(const float* x, float inverse, int64_t i, int64_t r, int64_t c) const {
    const float size = fabsf(laplacian(x, i, r, c)) * inverse;
    return size > job.edge_threshold ? size : 0.0f;
  }
  __device__ float edge_inverse(float rms_of_x) const { return 1 / (4 * (rms_of_x + kTiny)); }

  // (1, 2, 1)/4 along a row, borders replicated.
  __device__ float along(const float* x, int64_t c) const { return (x[c > 0 ? c - 1 : 0] + 2 * x[c] + x[c + 1 < cols ? c + 1 : c]) / 4; }

  __device__ void swap() {
    float* const held = gradient;
    gradient = momentum;
    momentum = held;
  }

  // The gradient becomes change(i, row, col) of it; returns the sum of squares.
  template <typename Change>
  __device__ double change_gradient(Change change) {
    float squares = 0;
    map_elements<2>(
        team, rows, cols,
        [&](int64_t i, int64_t r, int64_t c) {
          const float g = change(i, r, c);
          squares += g * g;
          return g;
        },
        [&](int64_t i, float g) { momentum[i] = g; });
    const double total = team.sum(squares);
    swap();
    return total;
  }

  // AGR with edge suppression, frequency penalty, rank penalty; the result lies in `gradient`, `momentum` is scratch.
  __device__ void shape_gradient() {
    const DType dtype = static_cast<DType>(job.grad_dtype);
    const float scale = job.grad_scale != nullptr ? 1.0f / *job.grad_scale : 1.0f, factor = job.maximize ? -scale : scale;
    const bool suppressed = job.edge_suppression && edges;
    const float inverse_l1 = 1 / ((job.grad_l1 != nullptr ? *job.grad_l1 : job.grad_l1_value) + job.eps3);
    float squares = 0;
    map_elements<4>(
        team, rows, cols,
        [&](int64_t i, int64_t, int64_t) {
          const float g = load_element(row.grad, dtype, i) * factor;
          const float kept = !job.amp || suppressed ? g : g * (1 - at_most_one(fabsf(g) * inverse_l1));
          squares += kept * kept;
          return kept;
        },
        [&](int64_t i, float g) { gradient[i] = g; });
    double total = team.sum(squares);
    if (!job.amp) return;
    if (suppressed) {
      const float inverse = edge_inverse(rms(total));
      total = change_gradient([&](int64_t i, int64_t r, int64_t c) {
        const float g = gradient[i], share = fabsf(g) * inverse_l1 * (1 + job.edge_penalty * edge(gradient, inverse, i, r, c));
        return g * (1 - at_most_one(share));
      });
    }
    if (job.frequency_penalty > 0 && edges) {
      total = change_gradient([&](int64_t i, int64_t r, int64_t c) {
        const float *const here = gradient + r * cols, *const above = r > 0 ? here - cols : here;
        const float* const below = r + 1 < rows ? here + cols : here;
        const float g = here[c], blurred = (along(above, c) + 2 * along(here, c) + along(below, c)) / 4;
        return g - job.frequency_penalty * (g - blurred);
      });
    }
    if (row.tail != nullptr) add_tail(job.rank_penalty_strength * rms(total));
  }

  // g += scale (P W), or W P where W has more rows than columns.
  __device__ void add_tail(float scale) {
    const DType dtype = static_cast<DType>(job.param_dtype);
    const bool wide = rows <= cols;
    const int64_t side = wide ? rows : cols;
    for_elements<1>(team, rows, cols, [&](int64_t i, int64_t r, int64_t c) {
      float sum = 0;
#pragma unroll 2
      for (int64_t k = 0; k < side; ++k) {
        sum += wide ? row.tail[r * side + k] * load_element(row.param, dtype, k * cols + c)
                    : load_element(row.param, dtype, r * cols + k) * row.tail[k * side + c];
      }
      gradient[i] += scale * sum;
    });
  }

  // Advances a second moment by value², in row means and column means (a vector: itself), and leaves 1 / sqrt of it, bias corrected, as
  // row_factor times col_factor.
  template <typename Value>
  __device__ void advance_factors(float* row_state, float* col_state, float beta, float rest, float eps, float correction, Value value,
                                  float* row_factor, float* col_factor) {
    const auto square = [&](int64_t i, int64_t r, int64_t c) {
      const float x = value(i, r, c);
      return x * x;
    };
    double total = 0;
    column_sums(team, rows, cols, shared.at.partial, square, [&](int64_t c, float sum) {
      const float moved = beta * col_state[c] + rest * (sum / static_cast<float>(rows) + eps);
      col_state[c] = moved;
      col_factor[c] = 1 / sqrtf(moved / correction);
    });
    if (matrix) {
      for_rows(team, rows, [&](int64_t r) {
        const float mean = row_sum(r, cols, square) / static_cast<float>(cols), moved = beta * row_state[r] + rest * (mean + eps);
        __syncwarp();  // every lane has read the state
        if (threadIdx.x % kWarp == 0) {
          row_state[r] = moved;
          total += moved;
        }
      });
    }
    const auto mean = static_cast<float>(team.sum(total) / static_cast<double>(rows));
    for (int64_t r = team.rank(); r < rows; r += team.size()) {
      row_factor[r] = matrix ? 1 / sqrtf(row_state[r] / (mean < 1e-38f ? 1e-38f : mean)) : 1.0f;
    }
    team.barrier();
  }

  // The normalised gradient, clipped once `clip` is known.
  __device__ float normalised(int64_t i, int64_t r, int64_t c) const {
    const float factor = shared.at.row_v[r] * shared.at.col_v[c];
    return gradient[i] * (factor > kMostByMoment ? kMostByMoment : factor) * clip;
  }

  // Variance of a row, without its bias, for all lanes of the row's warp.
  template <typename Value>
  __device__ float variance(int64_t r, Value value) const {
    const float mean = row_sum(r, cols, value) / static_cast<float>(cols);
    return row_sum(r, cols,
                   [&](int64_t i, int64_t at, int64_t c) {
                     const float x = value(i, at, c) - mean;
                     return x * x;
                   }) /
           static_cast<float>(cols);
  }

  // Per row: 1/2 where the gradient hardly varies, else 1.
  __device__ void find_background() {
    double total = 0;
    for_rows(team, rows, [&](int64_t r) {
      const float spread = variance(r, [&](int64_t i, int64_t, int64_t) { return gradient[i]; });
      if (threadIdx.x % kWarp == 0) {
        shared.at.row_keep[r] = spread;
        total += spread;
      }
    });
    const auto least = static_cast<float>(1e-2 * team.sum(total) / static_cast<double>(rows));
    for (int64_t r = team.rank(); r < rows; r += team.size()) shared.at.row_keep[r] = shared.at.row_keep[r] < least ? 0.5f : 1.0f;
    team.barrier();
  }

  // Per row: lr_bump by the variance of h, and its moving average.
  __device__ void find_bumps() {
    for_rows(team, rows, [&](int64_t r) {
      float bump = job.lr_bump;
      if (row.row_variance != nullptr) {
        float spread = variance(r, [&](int64_t i, int64_t at, int64_t c) { return normalised(i, at, c); });
        if (!first) spread = 0.9f * from_bfloat16(row.row_variance[r]) + 0.1f * spread;
        __syncwarp();
        if (threadIdx.x % kWarp == 0) row.row_variance[r] = to_bfloat16(spread);
        const float factor = spread * job.detail_preservation;
        bump *= factor > 1.5f ? 1.5f : factor > 0.5f ? factor : 0.5f;  // NaN: 0.5
      }
      if (threadIdx.x % kWarp == 0) shared.at.row_bump[r] = bump;
    });
    team.barrier();
  }

  __device__ float stored_momentum(int64_t i) const {
    if (!job.use_8bit) return static_cast<const float*>(row.exp_avg)[i];
    return shared.exp_avg.map[static_cast<const uint8_t*>(row.exp_avg)[i]] * row.exp_avg_absmax[i >> block_shift];
  }

  // A warp for each quantization block.
  __device__ void store_momentum() {
    if (!job.use_8bit) {
      for_elements<4>(team, rows, cols, [&](int64_t i, int64_t, int64_t) { static_cast<float*>(row.exp_avg)[i] = momentum[i]; });
      return;
    }
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for_rows(team, (numel + job.block_size - 1) / job.block_size, [&](int64_t block) {
      const int64_t first_element = block * job.block_size, left = numel - first_element, n = left < job.block_size ? left : job.block_size;
      const float* const m = momentum + first_element;
      uint32_t top = 0;
      for (int64_t j = lane; j < n; j += kWarp) {
        const uint32_t bits = float_bits(m[j]) & kAbsMask;
        if (bits < kInfBits) top = max(top, bits);
      }
      top = warp_max(top, kWarp * kElements);
      const float absmax = bits_float(top), reciprocal = 1 / absmax;
      const bool usual = absmax > 5.4210109e-20f && absmax < 1.3292280e+36f;  // 2^-64, 2^120: where `divide` is exact
      if (lane == 0) row.exp_avg_absmax[block] = absmax;
      for (int64_t j = lane; j < n; j += kWarp) {
        const float x = is_finite(m[j]) ? m[j] : 0.0f, z = usual ? divide(x, absmax, reciprocal) : absmax > 0 ? x / absmax : 0.0f;
        static_cast<uint8_t*>(row.exp_avg)[first_element + j] = dynamic8_encode_signed(shared.exp_avg.entry, z);
      }
    });
  }

  // 1 / norm of each column of m and of h; a vector is one column.
  __device__ void find_norms() {
    const auto inverse = [](double squares) { return 1 / (static_cast<float>(sqrt(squares)) + 1e-12f); };
    const auto square_m = [&](int64_t i, int64_t, int64_t) { return momentum[i] * momentum[i]; };
    const auto square_h = [&](int64_t i, int64_t r, int64_t c) {
      const float h = normalised(i, r, c);
      return h * h;
    };
    if (matrix) {
      column_sums(team, rows, cols, shared.at.partial, square_m, [&](int64_t c, float sum) { shared.at.col_m[c] = inverse(sum); });
      column_sums(team, rows, cols, shared.at.partial, square_h, [&](int64_t c, float sum) { shared.at.col_h[c] = inverse(sum); });
      return;
    }
    float m = 0, h = 0;
    for_elements<4>(team, rows, cols, [&](int64_t i, int64_t r, int64_t c) {
      m += square_m(i, r, c);
      h += square_h(i, r, c);
    });
    const float inverse_m = inverse(team.sum(m)), inverse_h = inverse(team.sum(h));
    for (int64_t c = team.rank(); c < cols; c += team.size()) {
      shared.at.col_m[c] = inverse_m;
      shared.at.col_h[c] = inverse_h;
    }
    team.barrier();
  }

  __device__ float advance_torque(int64_t i, int64_t c, float h, float root) const {
    const float agreement = clamp_float(momentum[i] * shared.at.col_m[c] * (h * shared.at.col_h[c]) * root, -1, 1);
    const float old =
        job.use_8bit ? static_cast<float>(static_cast<const int8_t*>(row.torque)[i]) * (1.0f / 127) : static_cast<float*>(row.torque)[i];
    const float s = (1 - job.adaptation_rate) * old + job.adaptation_rate * agreement;
    if (job.use_8bit) {
      static_cast<int8_t*>(row.torque)[i] = s == s ? static_cast<int8_t>(clamp_float(rintf(s * 127), -127, 127)) : int8_t{0};
    } else {
      static_cast<float*>(row.torque)[i] = s;
    }
    return s;
  }

  __device__ void advance_momentum() {
    const float beta1 = numbers.beta1, root = sqrtf(static_cast<float>(matrix ? rows : numel));
    const float emphasis = row.tail != nullptr ? job.low_rank_emphasis : 1.0f;
    map_elements<2>(
        team, rows, cols,
        [&](int64_t i, int64_t r, int64_t c) {
          const float h = normalised(i, r, c);
          if (row.torque == nullptr) return beta1 * stored_momentum(i) + (1 - beta1) * h;
          return beta1 * momentum[i] + (1 - beta1) * ((1 + advance_torque(i, c, h, root) * emphasis) / 2) * h;
        },
        [&](int64_t i, float m) { momentum[i] = m; });
    team.barrier();
  }

  __device__ float update(int64_t i, int64_t r, int64_t c) const {
    const float factor = shared.at.row_r[r] * shared.at.col_r[c];
    return momentum[i] * (factor > kMostByInstability ? kMostByInstability : factor);
  }

  // 1 / (eta sqrt(|p_row| + 1 / eta^2)) for each row.
  __device__ void find_row_scales() {
    const DType dtype = static_cast<DType>(job.param_dtype);
    for_rows(team, rows, [&](int64_t r) {
      float scale = 1;
      if (job.eta > 0 && matrix) {
        const float squares = row_sum(r, cols, [&](int64_t i, int64_t, int64_t) {
          const float p = load_element(row.param, dtype, i);
          return p * p;
        });
        scale = 1 / (job.eta * sqrtf(sqrtf(squares) + 1 / (job.eta * job.eta)));
      }
      if (threadIdx.x % kWarp == 0) shared.at.row_scale[r] = scale;
    });
    team.barrier();
  }

  // The learning rate of one element; during the warm-up it moves by agreement of signs. Polarity is read, not yet written.
  __device__ float advance_mask(int64_t i, int64_t r, uint32_t key) const {
    const int code = job.use_8bit && !first ? static_cast<const uint8_t*>(row.lr_mask)[i] : 128;
    float value = first ? numbers.lr_start : job.use_8bit ? shared.old_mask[code] : static_cast<const float*>(row.lr_mask)[i];
    if (!first && !signs) return value;
    value += numbers.lr_raise;
    if (signs && !first) {
      const bool before = (row.polarity[i >> 3] >> (i & 7)) & 1;
      value += (gradient[i] > 0) == before ? shared.at.row_bump[r] : -shared.at.row_bump[r];
    }
    value = clamp_float(value, job.min_lr, job.max_lr);
    if (job.use_8bit) {
      const auto table = [&](int c) { return shared.new_mask[c]; };
      static_cast<uint8_t*>(row.lr_mask)[i] = encode_by_chance(value, code, table, key, i);
    } else {
      static_cast<float*>(row.lr_mask)[i] = value;
    }
    return value;
  }

  // What edge suppression leaves of one element's update, u = scale * momentum.
  __device__ float advance_history(int64_t i, int64_t r, int64_t c, float inverse, uint32_t key) const {
    const int code = job.use_8bit ? static_cast<const uint8_t*>(row.edge_history)[i] : 0;
    const float old = job.use_8bit ? shared.history[code] : static_cast<const float*>(row.edge_history)[i];
    const float next = 0.9f * old + 0.1f * edge(momentum, inverse, i, r, c);
    if (job.use_8bit) {
      const float stored = next == next ? next : 0.0f;
      const auto table = [&](int at) { return shared.history[at]; };
      const int guess = static_cast<int>(sqrtf(clamp_float(stored * (1 / kHistoryMax), 0, 1)) * 255);
      static_cast<uint8_t*>(row.edge_history)[i] = encode_by_chance(stored, guess, table, key, i);
    } else {
      static_cast<float*>(row.edge_history)[i] = next;
    }
    return clamp_float(1 - job.edge_penalty * next, 0.1f, 1.0f);
  }

  __device__ void store_param(int64_t i, float p, uint32_t key) const {
    const DType dtype = static_cast<DType>(job.param_dtype);
    if (dtype == DType::kFloat32) {
      static_cast<float*>(row.param)[i] = p;
    } else if (job.param_rounding == static_cast<int>(ParamRounding::kStochastic)) {
      static_cast<uint16_t*>(row.param)[i] = to_dtype_stochastic(p, dtype, random16(key, static_cast<uint64_t>(i)));
    } else {
      static_cast<uint16_t*>(row.param)[i] = to_dtype(p, dtype);
    }
  }

  __device__ void apply() {
    float scale = 1, inverse = 0;  // of edges in scale * momentum
    if (job.amp) {
      float squares = 0, other = 0;
      for_elements<2>(team, rows, cols, [&](int64_t i, int64_t r, int64_t c) {
        const float u = update(i, r, c), g = gradient[i];
        squares += u * u;
        if (early) {
          const float directed = fabsf(u) * (g > 0 ? 1.0f : g < 0 ? -1.0f : 0.0f);
          momentum[i] = directed;
          other += directed * directed;
        } else {
          other += u * g > 0;
        }
      });
      scale = clip_of(team.sum(squares));
      const double all = team.sum(other);
      inverse = scale * edge_inverse(rms(all) * scale);
      const auto kept = static_cast<float>(all / static_cast<double>(numel));
      if (!early) scale /= kept < 1e-3f ? 1e-3f : kept;
    }
    const auto key = [&](uint32_t stream) {
      return stream_key(job.seed, static_cast<uint32_t>(step), static_cast<uint32_t>(row.index), stream);
    };
    const uint32_t mask_key = key(kStreamMask), history_key = key(kStreamHistory), param_key = key(kStreamParam);
    for_elements<1>(team, rows, cols, [&](int64_t i, int64_t r, int64_t c) {
      const float lr = job.amp ? advance_mask(i, r, mask_key) * numbers.lr_factor : numbers.lr_factor;
      float u = scale * (early ? momentum[i] : update(i, r, c));
      if (job.amp && !early) u = u * gradient[i] > 0 ? u * shared.at.row_keep[r] : u == u ? 0.0f : u;
      if (early && row.edge_history != nullptr) u *= advance_history(i, r, c, inverse, history_key);
      const float p = load_element(row.param, static_cast<DType>(job.param_dtype), i);
      store_param(i, p * (1 - lr * job.weight_decay) - lr * shared.at.row_scale[r] * u, param_key);
    });
    team.barrier();
  }

  __device__ void store_polarity() const {
    for (int64_t at = team.rank(); at < (numel + 7) / 8; at += team.size()) {
      uint32_t bits = 0;
      for (int64_t j = 0; j < 8 && 8 * at + j < numel; ++j) bits |= static_cast<uint32_t>(gradient[8 * at + j] > 0) << j;
      row.polarity[at] = static_cast<uint8_t>(bits);
    }
  }

  __device__ void run() {
    shape_gradient();
    const auto gradient_of = [&](int64_t i, int64_t, int64_t) { return gradient[i]; };
    advance_factors(row.exp_avg_sq_row, row.exp_avg_sq_col, job.beta2, job.rest2, job.eps1, numbers.bias_correction2, gradient_of,
                    shared.at.row_v, shared.at.col_v);
    for (int64_t r = team.rank(); r < rows; r += team.size()) shared.at.row_keep[r] = 1;
    team.barrier();
    if (job.amp && !early && job.background_regularization && matrix) find_background();
    clip = 1;
    float squares = 0;
    for_elements<4>(team, rows, cols, [&](int64_t i, int64_t r, int64_t c) {
      const float h = normalised(i, r, c);
      squares += h * h;
    });
    clip = clip_of(team.sum(squares));
    if (signs) find_bumps();
    if (row.torque != nullptr) {
      map_elements<4>(
          team, rows, cols, [&](int64_t i, int64_t, int64_t) { return stored_momentum(i); }, [&](int64_t i, float m) { momentum[i] = m; });
      find_norms();
    }
    advance_momentum();
    store_momentum();
    if (job.came && (job.amp || matrix)) {
      const auto instability = [&](int64_t i, int64_t r, int64_t c) { return normalised(i, r, c) - momentum[i]; };
      advance_factors(row.res_row, row.res_col, job.beta3, job.rest3, job.eps2, numbers.bias_correction3, instability, shared.at.row_r,
                      shared.at.col_r);
    } else {
      for (int64_t r = team.rank(); r < rows; r += team.size()) shared.at.row_r[r] = 1;
      for (int64_t c = team.rank(); c < cols; c += team.size()) shared.at.col_r[c] = 1;
    }
    find_row_scales();
    apply();
    if (signs) store_polarity();
    team.barrier();
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) came_8bit(CameArguments arguments) {
  __shared__ CameShared shared;
  load_tables(kDynamic8Signed, &shared.exp_avg);
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) shared.history[i] = history_value(i);
  int block_shift = 0;
  while (1 << block_shift < arguments.block_size) ++block_shift;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const bool one_team = arguments.one_team != 0;
  Team team{one_team ? block : 0, one_team ? blocks : 1, {arguments.arrived, arguments.partial}, 0, 0, shared.sums};
  float* const workspace = arguments.workspace + (one_team ? 0 : block * arguments.workspace_floats);
  for (int at = one_team ? 0 : block; at < arguments.n_jobs; at += one_team ? 1 : blocks) {
    const int2 job = arguments.jobs[at];
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.row = arguments.rows[job.x];
      shared.numbers = arguments.numbers[job.x];
    }
    __syncthreads();
    const CameRow& row = shared.row;
    const CameNumbers& numbers = shared.numbers;
    const bool first = numbers.old_table < 0;
    if (arguments.amp && arguments.use_8bit) {
      for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) {
        shared.old_mask[i] = first ? 0.0f : arguments.tables[static_cast<int>(numbers.old_table) * 256 + i];
        shared.new_mask[i] = arguments.tables[static_cast<int>(numbers.new_table) * 256 + i];
      }
    }
    const CamePhase phase = static_cast<CamePhase>(arguments.phase);
    const bool matrix = row.exp_avg_sq_row != nullptr, edges = matrix && row.rows > 2 && row.cols > 2;
    const bool early = arguments.amp && phase == CamePhase::kEarly, signs = arguments.amp && phase != CamePhase::kLate;
    Came came{arguments, row, numbers, shared, team, job.y, block_shift, row.rows, row.cols, row.numel, matrix, edges, early, signs, first};
    came.lay_out(workspace);
    __syncthreads();
    came.run();
  }
}

}  // namespace coat
