// The fused AdamW step on encoded moments. Compiled once for each instruction set.
//
//   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// A block of groups is decoded and advanced first, then encoded: while a block is advanced nothing waits for the maximum
// of a group.
#include "convert.h"
#include "decode.h"
#include "encode.h"

namespace coat::COAT_ISA {
namespace {

struct Moment {
  const GroupFormat* format;
  float beta;
  int column;       // in amax and k16
  uint8_t* codes;   // of the block
  float* values;    // of the block: the state itself where it is not quantized
  GroupStats stats[kBlock / kMinGroup];
};

// Where the elements of one block are. Staged arrays are padded with zeros to whole groups.
struct Block {
  const StepJob* job;
  const StepRow* row;
  int64_t first_group, first;
  int groups, count, padded;
  float* param;
  const float* grad;
  Moment exp_avg, exp_avg_sq;
};

struct Workspace {
  alignas(64) float param[kBlock];
  alignas(64) float grad[kBlock];
  alignas(64) float exp_avg[kBlock];
  alignas(64) float exp_avg_sq[kBlock];
  alignas(64) uint8_t exp_avg_codes[kBlock];
  alignas(64) uint8_t exp_avg_sq_codes[kBlock];
};

// Advances the group at element `at` of the block. A moment with kTable is decoded on the fly, otherwise its values are
// decoded already.
template <bool kTableM, bool kTableV>
void advance(Block& block, int group, const Decoder* decode_m, const Decoder* decode_v) {
  const StepJob& job = *block.job;
  const int n = job.exp_avg.group_size, at = group * n;
  float* const param = block.param + at;
  const float* const grad = block.grad + at;
  float *const exp_avg = block.exp_avg.values + at, *const exp_avg_sq = block.exp_avg_sq.values + at;
  const uint8_t *const codes_m = block.exp_avg.codes + at, *const codes_v = block.exp_avg_sq.codes + at;
  const F beta1 = set1(job.beta1), beta2 = set1(job.beta2), to_m = set1(job.grad_to_exp_avg), to_root_v = set1(job.grad_to_root_sq);
  const F decay = set1(job.decay), eps = set1(job.eps), step_size = set1(block.row->step_size);
  const F inv_bias2_root = set1(block.row->inv_bias2_root);
  Decoder table_m, table_v;
  if (kTableM) table_m = *decode_m;
  if (kTableV) table_v = *decode_v;
  I max_m = set1(0), max_v = set1(0), min_m = set1(-1), min_v = set1(-1);
  for (int i = 0; i < n; i += kLanes) {
    const F g = load(grad + i);
    const F old_m = kTableM ? decode(table_m, codes_m + i) : mul(beta1, load(exp_avg + i));
    const F old_v = kTableV ? decode(table_v, codes_v + i) : mul(beta2, load(exp_avg_sq + i));
    const F root = mul(to_root_v, g);
    const F m = fma(to_m, g, old_m), v = fma(root, root, old_v);
    const F update = div(m, fma(sqrt(v), inv_bias2_root, eps));
    store(param + i, fnma(step_size, update, mul(load(param + i), decay)));
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
    const I bits_m = as_int(abs(m)), bits_v = as_int(v);
    max_m = umax(max_m, bits_m);
    min_m = umin(min_m, bits_m);
    max_v = umax(max_v, bits_v);
    min_v = umin(min_v, bits_v);
  }
  uint32_t out[4];
  reduce(max_m, max_v, min_m, min_v, out);
  block.exp_avg.stats[group] = {out[0], out[2]};
  block.exp_avg_sq.stats[group] = {out[1], out[3]};
}

// Prepares the decoding of one moment's group: true and a decoder, or false with its values decoded.
bool prepare(const Block& block, const Moment& moment, int group, Decoder* decoder) {
  if (!moment.format->quantized) return false;
  const int64_t at = 2 * (block.first_group + group) + moment.column;
  const float amax = block.row->amax[at];
  const uint8_t meta = block.row->k16[at];
  const int first = group * moment.format->group_size;
  if (!tables_serve(*moment.format, moment.codes + first, amax, meta)) {
    decode_exactly(*moment.format, moment.codes + first, amax, meta, moment.values + first);
    return false;
  }
  *decoder = make_decoder(moment.format->decode[meta], moment.format->low_mask, amax, moment.beta);
  return true;
}

// v that overflowed from a finite gradient is held at the largest float32: the parameter stands still there.
void hold_overflow(Block& block, int group) {
  const int n = block.job->exp_avg.group_size, at = group * n;
  float* v = block.exp_avg_sq.values + at;
  for (int i = 0; i < n; ++i) {
    const bool finite_grad = is_finite(block.grad[at + i] * block.job->inv_grad_scale);
    if (finite_grad && float_bits(v[i]) == kInfBits) v[i] = kFloatMax;
  }
  block.exp_avg_sq.stats[group] = group_stats(v, n);
}

void advance_block(Block& block) {
  for (int group = 0; group < block.groups; ++group) {
    Decoder m, v;
    const bool table_m = prepare(block, block.exp_avg, group, &m), table_v = prepare(block, block.exp_avg_sq, group, &v);
    if (table_m && table_v) {
      advance<true, true>(block, group, &m, &v);
    } else if (table_m) {
      advance<true, false>(block, group, &m, &v);
    } else if (table_v) {
      advance<false, true>(block, group, &m, &v);
    } else {
      advance<false, false>(block, group, &m, &v);
    }
    if (block.exp_avg_sq.stats[group].max_bits >= kInfBits) hold_overflow(block, group);
  }
}

void encode_block(const Block& block, const Moment& moment, uint32_t key) {
  if (!moment.format->quantized) return;
  const int n = moment.format->group_size;
  for (int group = 0; group < block.groups; ++group) {
    const int64_t at = 2 * (block.first_group + group) + moment.column;
    encode_group(*moment.format, moment.values + group * n, moment.stats[group], key, block.first + group * n,
                 moment.codes + group * n, block.row->amax + at, block.row->k16 + at);
  }
}

// Points a moment at its state, or at padded copies where the block ends in a short group.
void open_moment(const Block& block, void* state, uint8_t* codes, float* values, Moment* moment) {
  const bool quantized = moment->format->quantized, whole = block.count == block.padded;
  uint8_t* const stored_codes = static_cast<uint8_t*>(state) + block.first;
  float* const stored_values = static_cast<float*>(state) + block.first;
  moment->codes = quantized && whole ? stored_codes : codes;
  moment->values = !quantized && whole ? stored_values : values;
  if (whole) return;
  if (quantized) {
    memset(codes, 0, static_cast<size_t>(block.padded));
    memcpy(codes, stored_codes, static_cast<size_t>(block.count));
  } else {
    load_floats(stored_values, DType::kFloat32, block.count, block.padded, values);
  }
}

void close_moment(const Block& block, void* state, const Moment& moment) {
  if (block.count == block.padded) return;
  const size_t count = static_cast<size_t>(block.count);
  if (moment.format->quantized) {
    memcpy(static_cast<uint8_t*>(state) + block.first, moment.codes, count);
  } else {
    memcpy(static_cast<float*>(state) + block.first, moment.values, count * 4);
  }
}

void open_params(Workspace& space, Block* block) {
  const StepJob& job = *block->job;
  const StepRow& row = *block->row;
  const bool whole = block->count == block->padded;
  void* const param = at(row.param, job.param_dtype, block->first);
  const void* const grad = at(row.grad, job.grad_dtype, block->first);
  block->param = space.param;
  block->grad = space.grad;
  if (job.param_rounding == ParamRounding::kSplit) {
    load_split(param, row.residual + block->first, block->count, block->padded, space.param);
  } else if (job.param_dtype == DType::kFloat32 && whole) {
    block->param = static_cast<float*>(param);
  } else {
    load_floats(param, job.param_dtype, block->count, block->padded, space.param);
  }
  if (job.grad_dtype == DType::kFloat32 && whole) {
    block->grad = static_cast<const float*>(grad);
  } else {
    load_floats(grad, job.grad_dtype, block->count, block->padded, space.grad);
  }
}

void close_params(const Block& block) {
  const StepJob& job = *block.job;
  void* const param = at(block.row->param, job.param_dtype, block.first);
  if (block.param == param) return;
  if (job.param_rounding == ParamRounding::kSplit) {
    store_split(block.param, block.count, param, block.row->residual + block.first);
  } else if (job.param_rounding == ParamRounding::kStochastic && job.param_dtype != DType::kFloat32) {
    store_stochastic(block.param, block.count, job.param_dtype, block.row->keys[kStreamParam], block.first, param);
  } else {
    store_floats(block.param, block.count, job.param_dtype, param);
  }
}

}  // namespace

void step(const StepJob& job, const StepRow& row, int64_t begin, int64_t end) {
  const int n = job.exp_avg.group_size;
  Workspace space;
  Block block;
  block.job = &job;
  block.row = &row;
  block.exp_avg.format = &job.exp_avg;
  block.exp_avg.beta = job.beta1;
  block.exp_avg.column = 0;
  block.exp_avg_sq.format = &job.exp_avg_sq;
  block.exp_avg_sq.beta = job.beta2;
  block.exp_avg_sq.column = 1;
  for (int64_t group = begin; group < end; group += kBlock / n) {
    block.first_group = group;
    block.first = group * n;
    block.groups = static_cast<int>(end - group < kBlock / n ? end - group : kBlock / n);
    block.padded = block.groups * n;
    block.count = static_cast<int>(row.numel - block.first < block.padded ? row.numel - block.first : block.padded);
    open_params(space, &block);
    open_moment(block, row.exp_avg, space.exp_avg_codes, space.exp_avg, &block.exp_avg);
    open_moment(block, row.exp_avg_sq, space.exp_avg_sq_codes, space.exp_avg_sq, &block.exp_avg_sq);
    advance_block(block);
    encode_block(block, block.exp_avg, row.keys[kStreamExpAvg]);
    encode_block(block, block.exp_avg_sq, row.keys[kStreamExpAvgSq]);
    close_moment(block, row.exp_avg, block.exp_avg);
    close_moment(block, row.exp_avg_sq, block.exp_avg_sq);
    close_params(block);
  }
}

}  // namespace coat::COAT_ISA
