// Entry points of two-stage group scaling.
#include "parallel.h"

namespace coat {
namespace {

// The largest of n non-negative floats, at least 2^-100: their patterns are ordered as they are.
float floored_maximum(const float* values, int64_t n) {
  auto top = static_cast<int32_t>(kMinAmaxBits);
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = static_cast<int32_t>(float_bits(values[i]));
    top = bits > top ? bits : top;
  }
  return bits_float(static_cast<uint32_t>(top));
}

}  // namespace

void group_amax(GroupAmaxJob job, int threads) {
  const Kernels& kernels = kernels_in_use();
  if (job.row % job.group_size == 0) {  // rows of whole groups are one long row
    job.row *= job.rows;
    job.rows = 1;
  }
  const int64_t groups = job.row == 0 ? 0 : job.rows * num_groups(job.row, job.group_size);
  parallel(groups, job.rows * job.row, threads, [&](int64_t begin, int64_t end) { kernels.group_amax(job, begin, end); });
}

void quantize_tensor(QuantizeTensorJob job, float* scale, int threads) {
  const Kernels& kernels = kernels_in_use();
  std::vector<float> amax(static_cast<size_t>(job.rows));
  for (int64_t i = 0; i < job.rows; ++i) {
    amax[static_cast<size_t>(i)] = floored_maximum(job.group_amax + i * job.groups, job.groups);
    scale[i] = amax[static_cast<size_t>(i)] / scaled_max(job.fmt);
  }
  job.amax = amax.data();
  expect_whole_write(job.codes, job.rows * job.row);
  const int64_t pieces = job.row == 0 ? 0 : job.rows * num_groups(job.row, kBlock);
  parallel(pieces, job.rows * job.row, threads, [&](int64_t begin, int64_t end) { kernels.quantize_tensor(job, begin, end); });
}

void dequantize_tensor(const DequantizeTensorJob& job, int threads) {
  const Kernels& kernels = kernels_in_use();
  const int64_t pieces = job.row == 0 ? 0 : job.rows * num_groups(job.row, kBlock);
  expect_whole_write(job.out, job.rows * job.row * dtype_size(job.out_dtype));
  parallel(pieces, job.rows * job.row, threads, [&](int64_t begin, int64_t end) { kernels.dequantize_tensor(job, begin, end); });
}

void transpose_bytes(const TransposeJob& job, int threads) {
  const Kernels& kernels = kernels_in_use();
  const int64_t stripes = num_groups(job.rows, kTransposeTile);
  parallel(stripes, job.rows * job.columns, threads, [&](int64_t begin, int64_t end) { kernels.transpose_bytes(job, begin, end); });
}

}  // namespace coat
