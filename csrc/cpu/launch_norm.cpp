#include "launch_norm.h"

#include "launch_rows.h"
#include "parallel.h"

namespace coat {

void norm(const NormJob& job, int threads) {
  const Kernels& kernels = kernels_in_use();
  each_row(job.rows, job.row, threads, kNormMemory * padded_row(job.row),
           [&](float* memory, int64_t begin, int64_t end) { kernels.norm(job, memory, begin, end); });
}

void norm_from_codes(const NormFromCodesJob& job, int threads) {
  const Kernels& kernels = kernels_in_use();
  each_row(job.rows, job.row, threads, kNormMemory * padded_row(job.row),
           [&](float* memory, int64_t begin, int64_t end) { kernels.norm_from_codes(job, memory, begin, end); });
}

void norm_backward(const NormBackwardJob& job, int64_t segments, float* dgain, float* dshift, int threads) {
  const Kernels& kernels = kernels_in_use();
  sum_rows({job.rows, job.row, segments, {dgain, dshift}}, threads, kNormBackwardMemory * padded_row(job.row),
           [&](float* memory, int64_t begin, int64_t end, float* gain_sum, float* shift_sum) {
             kernels.norm_backward(job, memory, begin, end, gain_sum, shift_sum);
           });
}

void norm_rope(const NormRopeJob& job, int threads) {
  const Kernels& kernels = kernels_in_use();
  each_row(job.shape.rows, job.shape.row, threads, kNormRopeMemory * padded_row(job.shape.row),
           [&](float* memory, int64_t begin, int64_t end) { kernels.norm_rope(job, memory, begin, end); });
}

void norm_rope_backward(const NormRopeBackwardJob& job, float* dweight, float* dfirst_weight, int threads) {
  const Kernels& kernels = kernels_in_use();
  sum_rows({job.shape.rows, job.shape.row, 1, {dweight, dfirst_weight}}, threads, kNormRopeMemory * padded_row(job.shape.row),
           [&](float* memory, int64_t begin, int64_t end, float* sum, float* first_sum) {
             kernels.norm_rope_backward(job, memory, begin, end, sum, first_sum);
           });
}

void gated_residual(const GatedResidualJob& job, int threads) {
  const Kernels& kernels = kernels_in_use();
  each_row(job.rows, job.row, threads, kGatedResidualMemory * padded_row(job.row),
           [&](float* memory, int64_t begin, int64_t end) { kernels.gated_residual(job, memory, begin, end); });
}

void gated_residual_backward(const GatedResidualBackwardJob& job, float* dgate, int threads) {
  const Kernels& kernels = kernels_in_use();
  sum_rows({job.rows, job.row, job.segments, {dgate, nullptr}}, threads, kGatedResidualMemory * padded_row(job.row),
           [&](float* memory, int64_t begin, int64_t end, float* sum, float*) {
             kernels.gated_residual_backward(job, memory, begin, end, sum);
           });
}

}  // namespace coat
