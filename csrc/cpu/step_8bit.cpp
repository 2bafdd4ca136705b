// The fused step on blockwise 8-bit moments. Compiled once for each instruction set.
//
//   adamw     m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//             p = (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//   lion      p = (1 - lr wd) p - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g
//   momentum  m = beta1 m + g;  p = m, or g + beta1 m
//
// A chunk of whole blocks is decoded and advanced first, then encoded: while a block is advanced nothing waits for its maximum.
#include "blockwise_map.h"
#include "params.h"

namespace coat::COAT_ISA {
namespace {

constexpr int kMaxBlocks = kBlock / kMinBlockSize;

// One moment of the chunk at hand.
struct Moment8 {
  const Dynamic8Tables* map;
  uint8_t* codes;
  float* values;  // the state itself where it is not quantized
  float* absmax;
  uint32_t max_bits[kMaxBlocks];
};

// Where the elements of one chunk are: `count` of them, padded with zeros to `padded` in staged arrays.
struct Chunk {
  const Step8bitJob* job;
  const Step8bitRow* row;
  int64_t first;
  int count, padded, blocks;
  float* param;
  const float* grad;
  Moment8 exp_avg, exp_avg_sq;

  int block_begin(int block) const { return block * job->block_size; }
  int block_end(int block) const {
    const int end = (block + 1) * job->block_size;
    return end < padded ? end : padded;
  }
};

struct Workspace {
  alignas(64) float param[kMaxBlockSize];
  alignas(64) float grad[kMaxBlockSize];
  alignas(64) float exp_avg[kMaxBlockSize];
  alignas(64) float exp_avg_sq[kMaxBlockSize];
  alignas(64) uint8_t exp_avg_codes[kMaxBlockSize];
  alignas(64) uint8_t exp_avg_sq_codes[kMaxBlockSize];
};

// x of each lane's sign as 1, -1 or 0; NaN stays NaN.
COAT_SIMD_INLINE F sign(F x) {
  const F huge = set1(1.7014118e38f);  // 2^127, twice: the smallest denormal becomes more than 1
  return min(set1(1.0f), max(set1(-1.0f), mul(mul(x, huge), huge)));
}

// The old values of a moment times `factor`; for codes, block's absmax is in it.
template <bool kQuantized>
COAT_SIMD_INLINE F old_values(const Moment8& moment, int i, F factor) {
  return mul(factor, kQuantized ? decode(moment.map->map, moment.codes + i) : load(moment.values + i));
}

// Advances one block and notes its moments' largest magnitudes.
template <Rule rule, bool kQuantized>
void advance(Chunk& chunk, int block) {
  const Step8bitJob& job = *chunk.job;
  Moment8 &first = chunk.exp_avg, &second = chunk.exp_avg_sq;
  constexpr bool kTwo = rule == Rule::kAdamW;
  const F scale_m = set1(kQuantized ? first.absmax[block] : 1.0f), scale_v = set1(kTwo && kQuantized ? second.absmax[block] : 1.0f);
  const F beta1 = mul(set1(job.beta1), scale_m), beta2 = mul(set1(job.beta2), kTwo ? scale_v : scale_m);
  const F to_first = set1(job.grad_to_first), to_second = set1(job.grad_to_second);
  const F decay = set1(job.decay), eps = set1(job.eps), lr = set1(job.lr), plain_beta1 = set1(job.beta1);
  const F step_size = set1(chunk.row->step_size), inv_bias2_root = set1(chunk.row->inv_bias2_root);
  I max_m = set1(0), max_v = set1(0);
  // Two vectors side by side, so that the next roots start while quotients are under way.
  constexpr int kWide = 2;
  const int end = chunk.block_end(block);
  for (int i = chunk.block_begin(block); i < end; i += kWide * kLanes) {
    F m[kWide], v[kWide], update[kWide];
    for (int w = 0; w < kWide; ++w) {
      const int e = i + w * kLanes;
      const F g = load(chunk.grad + e);
      if (rule == Rule::kLion) {
        const F old = old_values<kQuantized>(first, e, set1(1.0f));
        update[w] = sign(fma(to_first, g, mul(beta1, old)));
        m[w] = fma(to_second, g, mul(beta2, old));
      } else {
        m[w] = fma(to_first, g, old_values<kQuantized>(first, e, beta1));
      }
      if (rule == Rule::kMomentum) update[w] = job.nesterov ? fma(plain_beta1, m[w], mul(to_first, g)) : m[w];
      if (kTwo) {
        const F root = mul(to_second, g);
        v[w] = fma(root, root, old_values<kQuantized>(second, e, beta2));
      }
    }
    if (kTwo) {
      for (int w = 0; w < kWide; ++w) update[w] = fma(sqrt(v[w]), inv_bias2_root, eps);
    }
    for (int w = 0; w < kWide; ++w) {
      const int e = i + w * kLanes;
      store(first.values + e, m[w]);
      max_m = umax(max_m, as_int(abs(m[w])));
      if (!kTwo) continue;
      store(second.values + e, v[w]);
      max_v = umax(max_v, as_int(v[w]));
    }
    for (int w = 0; w < kWide; ++w) {
      const int e = i + w * kLanes;
      F p = update[w];
      if (kTwo) p = fnma(step_size, div(m[w], update[w]), mul(load(chunk.param + e), decay));
      if (rule == Rule::kLion) p = fnma(lr, update[w], mul(load(chunk.param + e), decay));
      store(chunk.param + e, p);
    }
  }
  first.max_bits[block] = largest(max_m);
  if (kTwo) second.max_bits[block] = largest(max_v);
}

void hold_block(Chunk& chunk, int block) {
  const int begin = chunk.block_begin(block), n = chunk.block_end(block) - begin;
  float* const v = chunk.exp_avg_sq.values + begin;
  hold_overflow(chunk.grad + begin, chunk.job->inv_grad_scale, n, v);
  chunk.exp_avg_sq.max_bits[block] = largest_bits(v, n);
}

template <Rule rule, bool kQuantized>
void advance_chunk(Chunk& chunk) {
  for (int block = 0; block < chunk.blocks; ++block) {
    advance<rule, kQuantized>(chunk, block);
    if (rule == Rule::kAdamW && chunk.exp_avg_sq.max_bits[block] >= kInfBits) hold_block(chunk, block);
  }
}

template <MapUse use>
void encode_moment(const Chunk& chunk, const Moment8& moment) {
  for (int block = 0; block < chunk.blocks; ++block) {
    const int begin = chunk.block_begin(block), n = chunk.block_end(block) - begin;
    moment.absmax[block] = encode_block<use>(moment.map->entry, moment.values + begin, n, moment.max_bits[block], moment.codes + begin);
  }
}

// Points a moment at its state, or at padded copies where the chunk ends in a short vector.
void open_moment(const Chunk& chunk, void* state, float* absmax, uint8_t* codes, float* values, Moment8* moment) {
  const bool quantized = chunk.job->quantized, whole = chunk.count == chunk.padded;
  if (quantized) moment->absmax = absmax + chunk.first / chunk.job->block_size;
  moment->codes = codes;
  moment->values = values;
  const size_t count = static_cast<size_t>(chunk.count), rest = static_cast<size_t>(chunk.padded - chunk.count);
  if (quantized) {
    uint8_t* const stored = static_cast<uint8_t*>(state) + chunk.first;
    if (whole) {
      moment->codes = stored;
    } else {
      memcpy(codes, stored, count);
      memset(codes + count, moment->map == chunk.job->signed_map ? kDynamic8Zero : 0, rest);
    }
  } else {
    float* const stored = static_cast<float*>(state) + chunk.first;
    if (whole) {
      moment->values = stored;
    } else {
      load_floats(stored, DType::kFloat32, chunk.count, chunk.padded, values);
    }
  }
}

void close_moment(const Chunk& chunk, void* state, const Moment8& moment) {
  if (chunk.count == chunk.padded) return;
  const size_t count = static_cast<size_t>(chunk.count);
  if (chunk.job->quantized) {
    memcpy(static_cast<uint8_t*>(state) + chunk.first, moment.codes, count);
  } else {
    memcpy(static_cast<float*>(state) + chunk.first, moment.values, count * 4);
  }
}

template <Rule rule, bool kQuantized>
void step_chunks(const Step8bitJob& job, const Step8bitRow& row, int64_t begin, int64_t end) {
  constexpr bool kTwo = rule == Rule::kAdamW;
  const int size = job.block_size, blocks_of_chunk = size < kBlock ? kBlock / size : 1;
  Workspace space;
  const ParamStorage params{row.param, job.param_dtype, job.param_rounding, row.residual, row.param_key};
  Chunk chunk{};
  chunk.job = &job;
  chunk.row = &row;
  chunk.exp_avg.map = job.signed_map;
  chunk.exp_avg_sq.map = job.unsigned_map;
  for (int64_t block = begin; block < end; block += blocks_of_chunk) {
    chunk.blocks = static_cast<int>(end - block < blocks_of_chunk ? end - block : blocks_of_chunk);
    chunk.first = block * size;
    const int64_t left = row.numel - chunk.first, whole = static_cast<int64_t>(chunk.blocks) * size;
    chunk.count = static_cast<int>(left < whole ? left : whole);
    chunk.padded = (chunk.count + kBlockStride - 1) / kBlockStride * kBlockStride;
    chunk.param = open_params(params, chunk.first, chunk.count, chunk.padded, space.param);
    chunk.grad = open_grads(row.grad, job.grad_dtype, chunk.first, chunk.count, chunk.padded, space.grad);
    open_moment(chunk, row.exp_avg, row.exp_avg_absmax, space.exp_avg_codes, space.exp_avg, &chunk.exp_avg);
    if (kTwo) open_moment(chunk, row.exp_avg_sq, row.exp_avg_sq_absmax, space.exp_avg_sq_codes, space.exp_avg_sq, &chunk.exp_avg_sq);
    advance_chunk<rule, kQuantized>(chunk);
    if (kQuantized) encode_moment<MapUse::kSigned>(chunk, chunk.exp_avg);
    if (kQuantized && kTwo) encode_moment<MapUse::kSecondMoment>(chunk, chunk.exp_avg_sq);
    close_moment(chunk, row.exp_avg, chunk.exp_avg);
    if (kTwo) close_moment(chunk, row.exp_avg_sq, chunk.exp_avg_sq);
    close_params(params, chunk.first, chunk.count, chunk.param);
  }
}

}  // namespace

void step_8bit(const Step8bitJob& job, const Step8bitRow& row, int64_t begin, int64_t end) {
  if (job.rule == Rule::kAdamW) {
    job.quantized ? step_chunks<Rule::kAdamW, true>(job, row, begin, end) : step_chunks<Rule::kAdamW, false>(job, row, begin, end);
  } else if (job.rule == Rule::kLion) {
    job.quantized ? step_chunks<Rule::kLion, true>(job, row, begin, end) : step_chunks<Rule::kLion, false>(job, row, begin, end);
  } else {
    job.quantized ? step_chunks<Rule::kMomentum, true>(job, row, begin, end) : step_chunks<Rule::kMomentum, false>(job, row, begin, end);
  }
}

}  // namespace coat::COAT_ISA
