// Eight neighbouring elements of a tensor in one thread's registers: loaded and stored 16 bytes at a time where the address allows it.
#pragma once

#include "../formats/parameters.h"
#include "../formats/random.h"

namespace coat {

// Threads of a block and elements of each: a tile of 4096 holds whole quantization blocks of every offered size.
constexpr int kThreads = 512, kElements = 8, kTile = kThreads * kElements;
constexpr int kWarp = 32;
constexpr uint32_t kEveryLane = 0xFFFFFFFFu;

// How many of a thread's elements from `first` on the tensor still has; none or less past its end.
__device__ inline int elements_left(int64_t numel, int64_t first) {
  return numel - first >= kElements ? kElements : static_cast<int>(numel - first);
}

// Elements as stored: all words for float32, the first four for a 16-bit dtype.
struct Raw {
  uint32_t word[kElements];
};

// Addresses read from a table could be of shared memory for all the compiler knows: without this every access is a generic one.
template <typename T>
__device__ inline T* in_global(T* address) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

__device__ inline bool is_aligned(const void* address) { return (reinterpret_cast<uintptr_t>(address) & 15) == 0; }

__device__ inline void load_words(const void* address, uint32_t* word) {
  const uint4 four = *static_cast<const uint4*>(address);
  word[0] = four.x, word[1] = four.y, word[2] = four.z, word[3] = four.w;
}

__device__ inline void store_words(void* address, const uint32_t* word) {
  *static_cast<uint4*>(address) = make_uint4(word[0], word[1], word[2], word[3]);
}

// The elements from `first` on; those from `count` on (perhaps all) are zero.
__device__ inline Raw load_raw(const void* base, DType dtype, int64_t first, int count) {
  Raw raw = {};
  const char* address = static_cast<const char*>(in_global(base)) + first * dtype_size(dtype);
  if (count >= kElements && is_aligned(address)) {
    load_words(address, raw.word);
    if (dtype == DType::kFloat32) load_words(address + 16, raw.word + 4);
  } else if (dtype == DType::kFloat32) {
    for (int j = 0; j < kElements; ++j) {
      if (j < count) raw.word[j] = reinterpret_cast<const uint32_t*>(address)[j];
    }
  } else {
    for (int j = 0; j < kElements; ++j) {
      if (j < count) raw.word[j / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(address)[j]) << (16 * (j % 2));
    }
  }
  return raw;
}

__device__ inline void store_raw(void* base, DType dtype, int64_t first, int count, const Raw& raw) {
  char* address = static_cast<char*>(in_global(base)) + first * dtype_size(dtype);
  if (count >= kElements && is_aligned(address)) {
    store_words(address, raw.word);
    if (dtype == DType::kFloat32) store_words(address + 16, raw.word + 4);
  } else if (dtype == DType::kFloat32) {
    for (int j = 0; j < kElements; ++j) {
      if (j < count) reinterpret_cast<uint32_t*>(address)[j] = raw.word[j];
    }
  } else {
    for (int j = 0; j < kElements; ++j) {
      if (j < count) reinterpret_cast<uint16_t*>(address)[j] = static_cast<uint16_t>(raw.word[j / 2] >> (16 * (j % 2)));
    }
  }
}

// Eight bytes (codes, residuals) are one access where they lie at a multiple of 8, as an optimizer's own do: not in a tensor's last few,
// which `fill` pads, nor in views that a caller of the ops may pass.
__device__ inline bool is_aligned_to_8(const void* address) { return (reinterpret_cast<uintptr_t>(address) & 7) == 0; }

__device__ inline uint2 load_bytes(const void* base, int64_t first, int count, uint32_t fill) {
  const uint8_t* address = static_cast<const uint8_t*>(in_global(base)) + first;
  if (count >= kElements && is_aligned_to_8(address)) return *reinterpret_cast<const uint2*>(address);
  uint32_t word[2] = {};
  for (int j = 0; j < kElements; ++j) word[j / 4] |= (j < count ? address[j] : fill) << (8 * (j % 4));
  return make_uint2(word[0], word[1]);
}

__device__ inline void store_bytes(void* base, int64_t first, int count, uint2 bytes) {
  uint8_t* address = static_cast<uint8_t*>(in_global(base)) + first;
  if (count >= kElements && is_aligned_to_8(address)) {
    *reinterpret_cast<uint2*>(address) = bytes;
    return;
  }
  for (int j = 0; j < kElements; ++j) {
    if (j < count) address[j] = static_cast<uint8_t>((j < 4 ? bytes.x : bytes.y) >> (8 * (j % 4)));
  }
}

__device__ inline uint32_t byte_of(uint2 bytes, int j) { return ((j < 4 ? bytes.x : bytes.y) >> (8 * (j % 4))) & 0xFF; }

__device__ inline uint2 pack_bytes(const uint32_t* value) {
  return make_uint2(value[0] | value[1] << 8 | value[2] << 16 | value[3] << 24, value[4] | value[5] << 8 | value[6] << 16 | value[7] << 24);
}

// The GPU's own conversions, one instruction where the portable ones take five to ten; NaN keeps being NaN, with another pattern.
__device__ inline float float16_value(uint16_t h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  return from_float16(h);
#endif
}

__device__ inline uint32_t pack_float16(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return to_float16(low) | static_cast<uint32_t>(to_float16(high)) << 16;
#endif
}

__device__ inline uint32_t pack_bfloat16(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return to_bfloat16(low) | static_cast<uint32_t>(to_bfloat16(high)) << 16;
#endif
}

__device__ inline void to_floats(const Raw& raw, DType dtype, float* x) {
  if (dtype == DType::kFloat32) {
    for (int j = 0; j < kElements; ++j) x[j] = bits_float(raw.word[j]);
  } else if (dtype == DType::kBFloat16) {
    for (int j = 0; j < kElements; ++j) x[j] = bits_float(j % 2 ? raw.word[j / 2] & 0xFFFF0000u : raw.word[j / 2] << 16);
  } else {
    for (int j = 0; j < kElements; ++j) x[j] = float16_value(static_cast<uint16_t>(raw.word[j / 2] >> (16 * (j % 2))));
  }
}

// x rounded to nearest.
__device__ inline Raw from_floats(const float* x, DType dtype) {
  Raw raw = {};
  if (dtype == DType::kFloat32) {
    for (int j = 0; j < kElements; ++j) raw.word[j] = float_bits(x[j]);
  } else {
    for (int j = 0; j < kElements / 2; ++j) {
      raw.word[j] = dtype == DType::kBFloat16 ? pack_bfloat16(x[2 * j], x[2 * j + 1]) : pack_float16(x[2 * j], x[2 * j + 1]);
    }
  }
  return raw;
}

// x rounded by chance to a 16-bit dtype; `first` is the number of its first element, a multiple of 8.
__device__ inline Raw from_floats_stochastic(const float* x, DType dtype, uint32_t key, int64_t first) {
  Raw raw = {};
  for (int j = 0; j < kElements / 2; ++j) {
    const uint32_t random = random_word(key, static_cast<uint32_t>((first >> 1) + j));
    const uint32_t low = to_dtype_stochastic(x[2 * j], dtype, random & 0xFFFF);
    raw.word[j] = low | static_cast<uint32_t>(to_dtype_stochastic(x[2 * j + 1], dtype, random >> 16)) << 16;
  }
  return raw;
}

}  // namespace coat
