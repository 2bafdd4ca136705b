// The codecs' constants and the integer rule of the metadata: the C++ twin of coat_kernels/formats/codecs.py.
// coat_kernels/formats/README.md gives every number here its meaning.
#pragma once

#include <cstdint>
#include <cstring>

// Internal linkage on purpose: these headers are compiled once per instruction set, and a merged inline
// function could carry AVX-512 code into the generic build.
#ifdef __CUDACC__
#define COAT_INLINE static inline __host__ __device__
#else
#define COAT_INLINE static inline
#endif

namespace coat {

enum class Codec : int {
  kFloat32 = 0,
  kE4M3 = 1,
  kE4M3Expand = 2,
  kE5M2 = 3,
  kE5M2Expand = 4,
  kLog8 = 5,
  kDynamic8 = 6,  // of blocks, dynamic8.h; no codec of groups
  kSoftsign8 = 7,
  kE2M1 = 8,
  kE2M1Expand = 9,
  kBFloat16 = 10,
};

constexpr int kNumCodecs = 11;
constexpr uint32_t kAbsMask = 0x7FFFFFFFu;
constexpr uint32_t kInfBits = 0x7F800000u;
constexpr uint32_t kNanBits = 0x7FC00000u;
constexpr uint32_t kMinNormalBits = 0x00800000u;
constexpr float kFloatMax = 3.402823466e+38f;
constexpr uint8_t kNanCode = 0x7F;
constexpr int kMaxOctaves = 32;
constexpr int kLog2SlackQ11 = 178;
constexpr int kUnitMeta = 16;  // k16 of k = 1
// Bits that tell a code below 16, whose value the product of nibble tables cannot give.
constexpr int kFp8LowMask = 0x70, kLog8LowMask = 0xF0;

// range_q15: 16 * log2(max / (2 * smallest subnormal)) in units of 2^-15.
struct CodecSpec {
  int mantissa_bits;
  int bias;
  int max_code;
  float max;
  bool expand;
  int range_q15;
};

COAT_INLINE CodecSpec codec_spec(Codec codec) {
  switch (codec) {
    case Codec::kE4M3:
      return {3, 7, 0x7E, 448.0f, false, 8811894};
    case Codec::kE4M3Expand:
      return {3, 7, 0x7E, 448.0f, true, 8811894};
    case Codec::kE5M2:
      return {2, 15, 0x7B, 57344.0f, false, 16151926};
    case Codec::kE5M2Expand:
      return {2, 15, 0x7B, 57344.0f, true, 16151926};
    case Codec::kLog8:
      return {0, 0, 255, 0.0f, false, 0};
    case Codec::kSoftsign8:
      return {0, 0, 127, 0.0f, false, 0};
    case Codec::kE2M1:
      return {1, 1, 7, 6.0f, false, 1355264};
    case Codec::kE2M1Expand:
      return {1, 1, 7, 6.0f, true, 1355264};
    default:
      return {0, 0, 0, 0.0f, false, 0};
  }
}

COAT_INLINE bool is_fp8(Codec codec) { return codec >= Codec::kE4M3 && codec <= Codec::kE5M2Expand; }
// Two codes share a byte.
COAT_INLINE bool is_e2m1(Codec codec) { return codec == Codec::kE2M1 || codec == Codec::kE2M1Expand; }
COAT_INLINE bool is_small_float(Codec codec) { return is_fp8(codec) || is_e2m1(codec); }
COAT_INLINE bool is_quantized(Codec codec) { return codec != Codec::kFloat32 && codec != Codec::kBFloat16; }

COAT_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

COAT_INLINE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

COAT_INLINE bool is_finite(float x) { return (float_bits(x) & kAbsMask) < kInfBits; }

COAT_INLINE int clamp_int(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// The metadata byte of a group: k16 (softsign8: 16) or j (log8).
// max_bits, min_bits: patterns of the largest and the smallest non-zero finite magnitude; 0 and anything for a group of zeros.
COAT_INLINE uint8_t group_meta(Codec codec, uint32_t max_bits, uint32_t min_bits) {
  const CodecSpec spec = codec_spec(codec);
  if (codec == Codec::kLog8) {
    if (max_bits == 0) return 1;
    const int step = 254 * 2048;
    const int octaves_q11 = static_cast<int>((max_bits - min_bits) >> 12) + kLog2SlackQ11;
    return static_cast<uint8_t>(clamp_int((250 * octaves_q11 + step - 1) / step, 1, 255));
  }
  if (!spec.expand || max_bits == 0) return kUnitMeta;
  const int spread_q15 = clamp_int(static_cast<int>((max_bits - min_bits) >> 8), 1, kMaxOctaves << 15);
  return static_cast<uint8_t>(clamp_int(spec.range_q15 / spread_q15, 1, 255));
}

}  // namespace coat
