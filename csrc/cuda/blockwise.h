// The blockwise dynamic map on a GPU: tables in shared memory, maxima of blocks over lanes and warps, eight codes a thread.
#pragma once

#include "../formats/dynamic8.h"
#include "elements.h"

namespace coat {

__device__ const Dynamic8Tables kDynamic8Signed = make_dynamic8_tables(true);
__device__ const Dynamic8Tables kDynamic8Unsigned = make_dynamic8_tables(false);

// 12 KB of global memory to shared memory; the caller synchronizes.
__device__ inline void load_tables(const Dynamic8Tables& from, Dynamic8Tables* to) {
  constexpr int kWords = sizeof(Dynamic8Tables) / 4;
  const uint32_t* source = reinterpret_cast<const uint32_t*>(&from);
  uint32_t* target = reinterpret_cast<uint32_t*>(to);
  for (int i = static_cast<int>(threadIdx.x); i < kWords; i += kThreads) target[i] = source[i];
}

// x / absmax as float32 rounds it, wherever that is at least 2^-24 (smaller ones take code 0 or 1 all alike), in three instructions.
// The remainder is exact. The corrected quotient, before it is rounded, is within 2^-23 of a unit of x / absmax, so it could only be
// rounded to the wrong side where x / absmax is that near to halfway: there are 17 million such pairs of 24-bit numbers, and all of them
// come out right (test_the_division_is_exact).
__device__ inline float divide(float x, float absmax, float reciprocal) {
  const float quotient = x * reciprocal;
  return fmaf(fmaf(-absmax, quotient, x), reciprocal, quotient);
}

// The reciprocal of a block's maximum. Where it or a remainder would lose bits to underflow, the block is scaled by a power of two first.
__device__ inline float make_divisible(float* x, float* absmax) {
  if (*absmax == 0) return 0.0f;
  if (*absmax < 5.4210109e-20f || *absmax > 1.3292280e+36f) {           // 2^-64, 2^120
    const float scale = *absmax < 1 ? 1.7014118e+38f : 7.4505806e-09f;  // 2^127, 2^-27
    *absmax *= scale;
    for (int j = 0; j < kElements; ++j) {
      const float scaled = x[j] * scale;
      x[j] = scaled == 0 ? x[j] : scaled;  // what is not zero remains so
    }
  }
  return __frcp_rn(*absmax);
}

// Pattern of the largest magnitude of eight. Non-finite elements are set to zero, or, of a second moment whose gradient is finite, to
// the largest float32.
__device__ inline uint32_t largest_finite(float* x, const float* grad) {
  uint32_t top = 0;
  for (int j = 0; j < kElements; ++j) top = max(top, float_bits(x[j]) & kAbsMask);
  if (top < kInfBits) return top;
  top = 0;
  for (int j = 0; j < kElements; ++j) {
    const uint32_t bits = float_bits(x[j]) & kAbsMask;
    const bool held = grad != nullptr && bits == kInfBits && is_finite(grad[j]);
    if (bits >= kInfBits) x[j] = held ? kFloatMax : 0.0f;
    top = max(top, float_bits(x[j]) & kAbsMask);
  }
  return top;
}

// Maximum over the lanes that hold one quantization block, or over the whole warp where the block spans several.
__device__ inline uint32_t warp_max(uint32_t top, int block_size) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if (block_size >= kWarp * kElements) return __reduce_max_sync(kEveryLane, top);
#endif
  for (int lane = 1; lane < kWarp && lane * kElements < block_size; lane *= 2) {
    top = max(top, __shfl_xor_sync(kEveryLane, top, lane));
  }
  return top;
}

// What the warps of a thread block tell each other of a tile: twice, so that one barrier a tile suffices.
template <int kMoments>
struct WarpMaxima {
  uint32_t top[2][kMoments][kThreads / kWarp];
};

// Each thread's maxima become those of its quantization block. All threads take part.
template <int kMoments>
__device__ inline void block_max(uint32_t* top, int block_size, int turn, WarpMaxima<kMoments>* shared) {
  for (int i = 0; i < kMoments; ++i) top[i] = warp_max(top[i], block_size);
  const int warps = block_size / (kWarp * kElements), warp = static_cast<int>(threadIdx.x) / kWarp;
  if (warps <= 1) return;
  if (threadIdx.x % kWarp == 0) {
    for (int i = 0; i < kMoments; ++i) shared->top[turn][i][warp] = top[i];
  }
  __syncthreads();
  for (int i = 0; i < kMoments; ++i) {
    for (int w = 0; w < warps; ++w) top[i] = max(top[i], shared->top[turn][i][(warp & ~(warps - 1)) + w]);
  }
}

__device__ inline void decode_codes(const float* map, uint2 codes, float absmax, float* x) {
  for (int j = 0; j < kElements; ++j) x[j] = map[byte_of(codes, j)] * absmax;
}

// Codes of eight finite elements, which are overwritten.
__device__ inline uint2 encode_signed(const uint32_t* entry, float* x, float absmax) {
  const float reciprocal = make_divisible(x, &absmax);
  uint32_t code[kElements];
  for (int j = 0; j < kElements; ++j) code[j] = dynamic8_encode_signed(entry, divide(x[j], absmax, reciprocal));
  return pack_bytes(code);
}

__device__ inline uint2 encode_unsigned(const uint32_t* entry, float* x, float absmax) {
  const float reciprocal = make_divisible(x, &absmax);
  uint32_t code[kElements];
  for (int j = 0; j < kElements; ++j) code[j] = dynamic8_encode_unsigned(entry, divide(x[j], absmax, reciprocal), false);
  return pack_bytes(code);
}

// The second moment's: no element is negative, and what is not zero takes at least code 1.
__device__ inline uint2 encode_nonzero(const uint32_t* entry, float* x, float absmax) {
  const float reciprocal = make_divisible(x, &absmax);
  uint32_t code[kElements];
  for (int j = 0; j < kElements; ++j) {
    code[j] = max(static_cast<uint32_t>(dynamic8_index(entry, divide(x[j], absmax, reciprocal))), min(float_bits(x[j]), 1u));
  }
  return pack_bytes(code);
}

// The first element of each quantization block's thread stores its maximum.
__device__ inline void store_absmax(float* absmax, int64_t first, int count, int block_size, uint32_t top) {
  if (count > 0 && (first & (block_size - 1)) == 0) absmax[first / block_size] = bits_float(top);
}

}  // namespace coat
