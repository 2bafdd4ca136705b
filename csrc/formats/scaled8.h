// The scaled 8-bit formats of activations: the C++ twin of the constants in coat_kernels/formats/scaled8.py. README.md there, "Scaled
// 8-bit (activations)", gives every number here its meaning.
#pragma once

#include "codecs.h"

namespace coat {

enum class ScaledFormat : int { kNone = 0, kE4M3 = 1, kE5M2 = 2, kInt8 = 3, kAuto = 4 };

// How the groups of a row are stored.
struct Scaled8 {
  int fmt;  // a ScaledFormat's number
  int group_size;
};

constexpr int kMinRowGroup = 16, kMaxRowGroup = 256;
constexpr uint32_t kMinAmaxBits = (127u - 100u) << 23;  // 2^-100
constexpr uint8_t kInt8NanCode = 0x80;

COAT_INLINE bool is_int8(int fmt) { return fmt == static_cast<int>(ScaledFormat::kInt8); }

// The largest code's value of e4m3, e5m2 or int8.
COAT_INLINE float scaled_max(int fmt) { return is_int8(fmt) ? 127.0f : fmt == static_cast<int>(ScaledFormat::kE4M3) ? 448.0f : 57344.0f; }

COAT_INLINE uint8_t scaled_nan_code(int fmt) { return is_int8(fmt) ? kInt8NanCode : kNanCode; }

// The rule of `auto` for a group of n elements whose int8 codes' squares add up to `squares`.
COAT_INLINE bool auto_takes_int8(int squares, int n) { return 50 * squares > 806450 + 5871 * n; }

}  // namespace coat
