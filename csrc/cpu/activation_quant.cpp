// Stand-alone quantize and dequantize in groups of a row. Compiled once for each instruction set.
#include "convert.h"
#include "scaled8.h"

namespace coat::COAT_ISA {
namespace {

// Calls run(first element, elements, first group) for pieces of groups [begin, end) of all rows: whole groups of one row, up to kBlock
// elements, or a row's last group.
template <typename Run>
COAT_SIMD_INLINE void for_pieces(int64_t row, int group_size, int64_t begin, int64_t end, Run run) {
  const int64_t groups_each = (row + group_size - 1) / group_size, step = kBlock / group_size;
  for (int64_t group = begin; group < end;) {
    const int64_t in_row = group % groups_each, left = groups_each - in_row;
    const int64_t wanted = end - group < left ? end - group : left, groups = wanted < step ? wanted : step;
    const int64_t offset = in_row * group_size, elements = groups * group_size < row - offset ? groups * group_size : row - offset;
    run(group / groups_each * row + offset, static_cast<int>(elements), group);
    group += groups;
  }
}

}  // namespace

void quantize_activation(const QuantizeActivationJob& job, int64_t begin, int64_t end) {
  alignas(64) float staged[kBlock];
  for_pieces(job.row, job.format.group_size, begin, end, [&](int64_t first, int elements, int64_t group) {
    const void* const from = at(job.x, job.x_dtype, first);
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
    const bool direct = job.out_dtype == DType::kFloat32;
    decode_row(job.format, job.codes + first, job.scale + group, elements, direct ? static_cast<float*>(to) : staged);
    if (!direct) store_floats(staged, elements, job.out_dtype, to);
  });
}

}  // namespace coat::COAT_ISA
