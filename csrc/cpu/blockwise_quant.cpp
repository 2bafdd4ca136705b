// Stand-alone blockwise quantize and dequantize. Compiled once for each instruction set.
#include "blockwise_map.h"
#include "convert.h"

namespace coat::COAT_ISA {

void quantize_blockwise(const QuantizeBlockwiseJob& job, int64_t begin, int64_t end) {
  alignas(64) float x[kMaxBlockSize];
  alignas(64) uint8_t codes[kMaxBlockSize];
  const uint32_t* const entry = job.tables->entry;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * job.block_size, left = job.numel - first;
    const int count = static_cast<int>(left < job.block_size ? left : job.block_size);
    const int padded = (count + kBlockStride - 1) / kBlockStride * kBlockStride;
    load_floats(at(job.x, job.x_dtype, first), job.x_dtype, count, padded, x);
    uint8_t* const out = count < padded ? codes : job.codes + first;
    const uint32_t max_bits = largest_bits(x, padded);
    job.absmax[block] = job.is_signed ? encode_block<MapUse::kSigned>(entry, x, padded, max_bits, out)
                                      : encode_block<MapUse::kUnsigned>(entry, x, padded, max_bits, out);
    if (count < padded) memcpy(job.codes + first, codes, static_cast<size_t>(count));
  }
}

void dequantize_blockwise(const DequantizeBlockwiseJob& job, int64_t begin, int64_t end) {
  alignas(64) float x[kMaxBlockSize];
  uint8_t staged[kBlockStride] = {};
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * job.block_size, left = job.numel - first;
    const int count = static_cast<int>(left < job.block_size ? left : job.block_size), whole = count - count % kLanes;
    const uint8_t* const codes = job.codes + first;
    const F absmax = set1(job.absmax[block]);
    for (int i = 0; i < whole; i += kLanes) store(x + i, mul(decode(job.tables->map, codes + i), absmax));
    if (whole < count) {
      memcpy(staged, codes + whole, static_cast<size_t>(count - whole));
      store(x + whole, mul(decode(job.tables->map, staged), absmax));
    }
    store_floats(x, count, job.out_dtype, at(job.out, job.out_dtype, first));
  }
}

}  // namespace coat::COAT_ISA
