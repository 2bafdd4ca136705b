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
