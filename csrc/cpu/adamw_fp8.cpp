// The fused AdamW step on encoded moments. Compiled once for each instruction set.
//
//   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// A block of groups is decoded and advanced first, then encoded: while a block is advanced nothing waits for the maximum
// of a group.
#include "decode.h"
#include "encode.h"
#include "params.h"

namespace coat::COAT_ISA {
namespace {

struct Moment {
  const GroupFormat* format;
  float beta;
  int column;            // in amax and k16
  ParamStorage storage;  // of the tensor: uint8 codes, or values of its dtype
  uint8_t* codes;        // of the block
  float* values;         // of the block: the state itself where it is float32
  Plan plan;

  uint8_t* stored_codes(int64_t first) const { return static_cast<uint8_t*>(storage.data) + (format->packed ? first / 2 : first); }
};

// Where `advance` finds a group's old values.
enum class Form {
  kValues,    // at hand: times beta already if they were codes
  kTable,     // decoded on the fly, beta folded in
  kSoftsign,  // likewise
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

  float* amax(const Moment& moment, int group) const { return row->amax + 2 * (first_group + group) + moment.column; }
  uint8_t* meta(const Moment& moment, int group) const { return row->k16 + 2 * (first_group + group) + moment.column; }
};

struct Workspace {
  alignas(64) float param[kBlock];
  alignas(64) float grad[kBlock];
  alignas(64) float exp_avg[kBlock];
  alignas(64) float exp_avg_sq[kBlock];
  alignas(64) uint8_t exp_avg_codes[kBlock];
  alignas(64) uint8_t exp_avg_sq_codes[kBlock];
};

Form open_group(const Block& block, const Moment& moment, int group) {
  const GroupFormat& format = *moment.format;
  const int n = format.group_size, at = group * n;
  if (!format.quantized) return Form::kValues;
  if (format.codec == Codec::kSoftsign8) return Form::kSoftsign;
  const float amax = block.amax(moment, group)[0];
  const uint8_t meta = block.meta(moment, group)[0];
  if (!out_of_range(format, amax, meta) && !has_nan(format, moment.codes + at)) return Form::kTable;
  decode_group(format, moment.codes + at, amax, meta, moment.beta, moment.values + at);
  return Form::kValues;
}

Decoder open_decoder(const Block& block, const Moment& moment, int group) {
  const DecodeTable& table = moment.format->decode[block.meta(moment, group)[0]];
  return make_decoder(table, moment.format->low_mask, block.amax(moment, group)[0], moment.beta);
}

template <Form kM, Form kV>
void advance(Block& block, int group) {
  const StepJob& job = *block.job;
  Moment &moment_m = block.exp_avg, &moment_v = block.exp_avg_sq;
  const int n = job.exp_avg.group_size, at = group * n;
  float* const param = block.param + at;
  const float* const grad = block.grad + at;
  float *const exp_avg = moment_m.values + at, *const exp_avg_sq = moment_v.values + at;
  const uint8_t *const codes_m = moment_m.codes + at, *const codes_v = moment_v.codes + at;
  const F beta1 = set1(job.exp_avg.quantized ? 1.0f : job.beta1), beta2 = set1(job.exp_avg_sq.quantized ? 1.0f : job.beta2);
  const F to_m = set1(job.grad_to_exp_avg), to_root_v = set1(job.grad_to_root_sq);
  const F decay = set1(job.decay), eps = set1(job.eps), step_size = set1(block.row->step_size);
  const F inv_bias2_root = set1(block.row->inv_bias2_root);
  Decoder table_m, table_v;
  SoftsignDecoder softsign_m;
  if (kM == Form::kTable) table_m = open_decoder(block, moment_m, group);
  if (kV == Form::kTable) table_v = open_decoder(block, moment_v, group);
  if (kM == Form::kSoftsign) softsign_m = make_softsign_decoder(block.amax(moment_m, group)[0], job.beta1);
  const auto old_m = [&](int e) __attribute__((always_inline)) {
    if (kM == Form::kTable) return decode(table_m, codes_m + e);
    return kM == Form::kSoftsign ? decode(softsign_m, codes_m + e) : mul(beta1, load(exp_avg + e));
  };
  const auto old_v = [&](int e) __attribute__((always_inline)) {
    return kV == Form::kTable ? decode(table_v, codes_v + e) : mul(beta2, load(exp_avg_sq + e));
  };
  I max_m = set1(0), max_v = set1(0), min_m = set1(-1), min_v = set1(-1);
  // Two vectors side by side, so that the next roots start while quotients are under way: 5 % of a step.
  constexpr int kWide = 2;
  for (int i = 0; i < n; i += kWide * kLanes) {
    F m[kWide], v[kWide], denominator[kWide];
    for (int w = 0; w < kWide; ++w) {
      const int e = i + w * kLanes;
      const F g = load(grad + e), root = mul(to_root_v, g);
      m[w] = fma(to_m, g, old_m(e));
      v[w] = fma(root, root, old_v(e));
    }
    for (int w = 0; w < kWide; ++w) denominator[w] = fma(sqrt(v[w]), inv_bias2_root, eps);
    for (int w = 0; w < kWide; ++w) {
      const int e = i + w * kLanes;
      store(exp_avg + e, m[w]);
      store(exp_avg_sq + e, v[w]);
      const I bits_m = as_int(abs(m[w])), bits_v = as_int(v[w]);
      max_m = umax(max_m, bits_m);
      min_m = umin(min_m, bits_m);
      max_v = umax(max_v, bits_v);
      min_v = umin(min_v, bits_v);
    }
    for (int w = 0; w < kWide; ++w) {
      const int e = i + w * kLanes;
      store(param + e, fnma(step_size, div(m[w], denominator[w]), mul(load(param + e), decay)));
    }
  }
  uint32_t out[4];
  reduce(max_m, max_v, min_m, min_v, out);
  moment_m.plan.max_bits[group] = out[0];
  moment_v.plan.max_bits[group] = out[1];
  moment_m.plan.min_bits[group] = out[2];
  moment_v.plan.min_bits[group] = out[3];
}

void hold_group(Block& block, int group) {
  const int n = block.job->exp_avg.group_size, at = group * n;
  float* v = block.exp_avg_sq.values + at;
  hold_overflow(block.grad + at, block.job->inv_grad_scale, n, v);
  const GroupStats stats = group_stats(v, n);
  block.exp_avg_sq.plan.max_bits[group] = stats.max_bits;
  block.exp_avg_sq.plan.min_bits[group] = stats.min_bits;
}

template <Form kM>
void advance(Block& block, int group, Form v) {
  v == Form::kTable ? advance<kM, Form::kTable>(block, group) : advance<kM, Form::kValues>(block, group);
}

void advance_block(Block& block) {
  for (int group = 0; group < block.groups; ++group) {
    const Form m = open_group(block, block.exp_avg, group), v = open_group(block, block.exp_avg_sq, group);
    if (m == Form::kTable) {
      advance<Form::kTable>(block, group, v);
    } else if (m == Form::kSoftsign) {
      advance<Form::kSoftsign>(block, group, v);
    } else {
      advance<Form::kValues>(block, group, v);
    }
    if (block.exp_avg_sq.plan.max_bits[group] >= kInfBits) hold_group(block, group);
  }
}

// Encodes one moment; meanwhile the next block's part of `next` (the parameter or the gradient) and of the codes comes in.
void encode_block(Block& block, Moment* moment, const void* next, DType dtype) {
  if (!moment->format->quantized) return;
  const int n = moment->format->group_size;
  const int64_t end = block.first + block.padded;
  const Upcoming values{static_cast<const char*>(at(next, dtype, end)), n * dtype_size(dtype)};
  const Upcoming codes{reinterpret_cast<const char*>(moment->stored_codes(end)), moment->format->packed ? n / 2 : n};
  const Destination to{moment->codes, block.amax(*moment, 0), block.meta(*moment, 0), 2, moment->storage.key, block.first, {values, codes}};
  encode_groups(*moment->format, &moment->plan, moment->values, block.groups, to);
}

// Points a moment at its state, or at copies where the block ends in a short group, codes share bytes or values are bfloat16.
void open_moment(const Block& block, uint8_t* codes, float* values, Moment* moment) {
  if (!moment->format->quantized) {
    moment->values = open_params(moment->storage, block.first, block.count, block.padded, values);
    return;
  }
  moment->values = values;
  uint8_t* const stored = moment->stored_codes(block.first);
  const bool whole = block.count == block.padded;
  moment->codes = whole && !moment->format->packed ? stored : codes;
  if (!whole) memset(codes, 0, static_cast<size_t>(block.padded));
  if (moment->format->packed) {
    unpack_codes(stored, block.count, codes);
  } else if (!whole) {
    memcpy(codes, stored, static_cast<size_t>(block.count));
  }
}

void close_moment(const Block& block, const Moment& moment) {
  if (!moment.format->quantized) {
    if (moment.storage.dtype == DType::kBFloat16) hold_in_bfloat16(block.count, moment.values);
    close_params(moment.storage, block.first, block.count, moment.values);
  } else if (moment.format->packed) {
    pack_codes(moment.codes, block.count, moment.stored_codes(block.first));
  } else if (block.count < block.padded) {
    memcpy(moment.stored_codes(block.first), moment.codes, static_cast<size_t>(block.count));
  }
}

Moment make_moment(const GroupFormat& format, float beta, int column, void* state, uint32_t key) {
  Moment moment{};
  moment.format = &format;
  moment.beta = beta;
  moment.column = column;
  const ParamRounding rounding = format.stochastic ? ParamRounding::kStochastic : ParamRounding::kNearest;
  moment.storage = {state, format.codec == Codec::kBFloat16 ? DType::kBFloat16 : DType::kFloat32, rounding, nullptr, key};
  return moment;
}

}  // namespace

void step(const StepJob& job, const StepRow& row, int64_t begin, int64_t end) {
  const int n = job.exp_avg.group_size;
  Workspace space;
  const ParamStorage params{row.param, job.param_dtype, job.param_rounding, row.residual, row.keys[kStreamParam]};
  Block block{};
  block.job = &job;
  block.row = &row;
  block.exp_avg = make_moment(job.exp_avg, job.beta1, 0, row.exp_avg, row.keys[kStreamExpAvg]);
  block.exp_avg_sq = make_moment(job.exp_avg_sq, job.beta2, 1, row.exp_avg_sq, row.keys[kStreamExpAvgSq]);
  for (int64_t group = begin; group < end; group += kBlock / n) {
    block.first_group = group;
    block.first = group * n;
    block.groups = static_cast<int>(end - group < kBlock / n ? end - group : kBlock / n);
    block.padded = block.groups * n;
    block.count = static_cast<int>(row.numel - block.first < block.padded ? row.numel - block.first : block.padded);
    block.param = open_params(params, block.first, block.count, block.padded, space.param);
    block.grad = open_grads(row.grad, job.grad_dtype, block.first, block.count, block.padded, space.grad);
    open_moment(block, space.exp_avg_codes, space.exp_avg, &block.exp_avg);
    open_moment(block, space.exp_avg_sq_codes, space.exp_avg_sq, &block.exp_avg_sq);
    advance_block(block);
    encode_block(block, &block.exp_avg, row.param, job.param_dtype);
    encode_block(block, &block.exp_avg_sq, row.grad, job.grad_dtype);
    close_moment(block, block.exp_avg);
    close_moment(block, block.exp_avg_sq);
    close_params(params, block.first, block.count, block.param);
  }
}

}  // namespace coat::COAT_ISA
