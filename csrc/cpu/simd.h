// One vocabulary for vectors of float and int32, in a namespace for each instruction set (COAT_ISA: avx512, avx2, generic).
//   F, I, M          kLanes floats, int32s, and a mask of them
//   Table16, Table32 constant tables of 32-bit entries, looked up by the low 4 or 5 bits of an index
// Only what the kernels use is here, and every variant defines all of it.
#pragma once

#include <cstdint>
#include <cstring>

#include "../formats/codecs.h"
#include "../formats/parameters.h"
#include "kernels.h"

#define COAT_SIMD_INLINE static inline __attribute__((always_inline))
#define COAT_SIMD_MEMBER inline __attribute__((always_inline))

#if defined(COAT_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(COAT_ISA_AVX2)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace coat::COAT_ISA {

// Runs code_of(i) on every vector of n codes (a multiple of kLanes) and stores the bytes.
template <typename CodeOf>
COAT_SIMD_INLINE void store_codes(uint8_t* codes, int n, CodeOf code_of) {
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    store_u8(codes + i, code_of(i), code_of(i + kLanes), code_of(i + 2 * kLanes), code_of(i + 3 * kLanes));
  }
  for (; i < n; i += kLanes) store_u8(codes + i, code_of(i));
}

}  // namespace coat::COAT_ISA
