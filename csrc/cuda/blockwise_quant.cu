// Blockwise quantize and dequantize. A tile of 4096 elements is one turn of a thread block; blocks go on through the tiles, so that the
// tables are fetched once for many of them.
#include "blockwise.h"

namespace coat {

// x, codes and absmax of one contiguous tensor: codes [numel], absmax [ceil(numel / block_size)].
struct QuantizeArguments {
  void* x;
  uint8_t* codes;
  float* absmax;
  int64_t numel;
  int32_t dtype, block_size, is_signed;
};

extern "C" __global__ void __launch_bounds__(kThreads, 2) quantize_blockwise(QuantizeArguments arguments) {
  __shared__ Dynamic8Tables tables;
  __shared__ WarpMaxima<1> maxima;
  load_tables(arguments.is_signed ? kDynamic8Signed : kDynamic8Unsigned, &tables);
  __syncthreads();
  const DType dtype = static_cast<DType>(arguments.dtype);
  const int block_size = arguments.block_size;
  int turn = 0;
  for (int64_t tile = blockIdx.x; tile * kTile < arguments.numel; tile += gridDim.x, turn ^= 1) {
    const int64_t first = tile * kTile + threadIdx.x * kElements;
    const int count = elements_left(arguments.numel, first);
    float x[kElements];
    to_floats(load_raw(arguments.x, dtype, first, count), dtype, x);
    uint32_t top[1] = {largest_finite(x, nullptr)};
    block_max<1>(top, block_size, turn, &maxima);
    const float absmax = bits_float(top[0]);
    const uint2 codes = arguments.is_signed ? encode_signed(tables.entry, x, absmax) : encode_unsigned(tables.entry, x, absmax);
    store_bytes(arguments.codes, first, count, codes);
    store_absmax(arguments.absmax, first, count, block_size, top[0]);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) dequantize_blockwise(QuantizeArguments arguments) {
  __shared__ float map[256];
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) {
    map[i] = arguments.is_signed ? kDynamic8Signed.map[i] : kDynamic8Unsigned.map[i];
  }
  __syncthreads();
  const DType dtype = static_cast<DType>(arguments.dtype);
  for (int64_t tile = blockIdx.x; tile * kTile < arguments.numel; tile += gridDim.x) {
    const int64_t first = tile * kTile + threadIdx.x * kElements;
    const int count = elements_left(arguments.numel, first);
    if (count <= 0) continue;
    float x[kElements];
    decode_codes(map, load_bytes(arguments.codes, first, count, 0), arguments.absmax[first / arguments.block_size], x);
    store_raw(arguments.x, dtype, first, count, from_floats(x, dtype));
  }
}

}  // namespace coat
