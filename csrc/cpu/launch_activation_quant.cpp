// Entry points of quantize and dequantize in groups of a row.
#include "parallel.h"

namespace coat {
namespace {

// Groups of all rows. Rows of whole groups are one long row: pieces of work then do not end with a short row.
template <typename Job>
int64_t flatten(Job* job) {
  if (job->row % job->format.group_size == 0) {
    job->row *= job->rows;
    job->rows = 1;
  }
  return job->row == 0 ? 0 : job->rows * num_groups(job->row, job->format.group_size);
}

}  // namespace

void quantize_activation(QuantizeActivationJob job, int threads) {
  const Kernels& kernels = kernels_in_use();
  const int64_t groups = flatten(&job);
  expect_whole_write(job.codes, job.rows * job.row);
  parallel(groups, job.rows * job.row, threads, [&](int64_t begin, int64_t end) { kernels.quantize_activation(job, begin, end); });
}

void dequantize_activation(DequantizeActivationJob job, int threads) {
  const Kernels& kernels = kernels_in_use();
  const int64_t groups = flatten(&job);
  expect_whole_write(job.out, job.rows * job.row * dtype_size(job.out_dtype));
  parallel(groups, job.rows * job.row, threads, [&](int64_t begin, int64_t end) { kernels.dequantize_activation(job, begin, end); });
}

}  // namespace coat
