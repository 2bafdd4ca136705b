// Stand-alone group quantize and dequantize. Compiled once for each instruction set.
#include "convert.h"
#include "decode.h"
#include "encode.h"

namespace coat::COAT_ISA {

void quantize(const QuantizeJob& job, int64_t begin, int64_t end) {
  const int size = job.format.group_size;
  alignas(64) float x[kBlock];
  alignas(64) uint8_t codes[kBlock];
  Plan plan{};
  for (int64_t group = begin; group < end; group += kBlock / size) {
    const int groups = static_cast<int>(end - group < kBlock / size ? end - group : kBlock / size);
    const int64_t first = group * size;
    const int padded = groups * size;
    const int count = static_cast<int>(job.numel - first < padded ? job.numel - first : padded);
    load_floats(at(job.x, job.x_dtype, first), job.x_dtype, count, padded, x);
    for (int g = 0; g < groups; ++g) {
      const GroupStats stats = group_stats(x + g * size, size);
      plan.max_bits[g] = stats.max_bits;
      plan.min_bits[g] = stats.min_bits;
    }
    uint8_t* const out = count < padded || job.format.packed ? codes : job.codes + first;
    encode_groups(job.format, &plan, x, groups, {out, job.amax + group, job.k16 + group, 1, job.key, first, {}});
    if (job.format.packed) {
      pack_codes(codes, count, job.codes + first / 2);
    } else if (count < padded) {
      memcpy(job.codes + first, codes, static_cast<size_t>(count));
    }
  }
}

void dequantize(const DequantizeJob& job, int64_t begin, int64_t end) {
  const int size = job.format.group_size;
  alignas(64) float x[kMaxGroup];
  uint8_t codes[kMaxGroup] = {};
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * size;
    const int count = static_cast<int>(job.numel - first < size ? job.numel - first : size);
    const uint8_t* in = codes;
    if (job.format.packed) {
      unpack_codes(job.codes + first / 2, count, codes);
    } else if (count < size) {
      memcpy(codes, job.codes + first, static_cast<size_t>(count));
    } else {
      in = job.codes + first;
    }
    decode_group(job.format, in, job.amax[group], job.k16[group], 1.0f, x);
    store_floats(x, count, job.out_dtype, at(job.out, job.out_dtype, first));
  }
}

}  // namespace coat::COAT_ISA
