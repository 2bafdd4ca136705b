// Stand-alone quantize and dequantize in groups of a row. Compiled once for each instruction set.
#include "convert.h"
#include "scaled8.h"

namespace coat::COAT_ISA {
void quantize_activation(const QuantizeActivationJob& job, int64_t begin, int64_t end) {
  alignas(64) float staged[kBlock];
  for_pieces(job.row, job.format.group_size, begin, end, [&](int64_t first, int elements, int64_t group) {
    const void* const from = at(job.x, job.x_dtype, first);
    prefetch_next(from, elements * dtype_size(job.x_dtype));
    const float* x = static_cast<const float*>(from);
    if (job.x_dtype != DType::kFloat32) {
      load_floats(from, job.x_dtype, elements, elements, staged);
      x = staged;
    }
    encode_row(job.format, x, elements, job.codes + first, job.scale + group);
  });
}

void dequantize_activation(const DequantizeActivationJob& job, int64_t begin, int64_t end) {
  alignas(64) float staged[kBlock];
  for_pieces(job.row, job.format.group_size, begin, end, [&](int64_t first, int elements, int64_t group) {
    void* const to = at(job.out, job.out_dtype, first);
    prefetch_next(job.codes + first, elements);
    const bool direct = job.out_dtype == DType::kFloat32;
    decode_row(job.format, job.codes + first, job.scale + group, elements, direct ? static_cast<float*>(to) : staged);
    if (!direct) store_floats(staged, elements, job.out_dtype, to);
  });
}

}  // namespace coat::COAT_ISA
