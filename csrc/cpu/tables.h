// Constant tables of the codecs, computed in double on first use. Independent of the instruction set.
#pragma once

#include "../formats/codecs.h"

namespace coat {

// The values of all codes of one metadata byte, relative to amax, as products of nibble tables:
//   x = amax * hi[code >> 4] * (code & low_mask ? lo : low)[code & 15]
// exact for the code of max, with the sign of FP8 and e2m1 in hi. 192 bytes where 256 values would take 1024, and 16 entries
// are one permute. NaN codes decode to numbers here: whoever reads must look for them.
struct alignas(64) DecodeTable {
  float hi[16];
  float lo[16];
  float low[16];
  float exact_below;  // groups of smaller amax leave float32's normal range on the way: decode them with decode_exact
};

// Decode tables of a quantized codec of groups other than softsign8, indexed by the metadata byte.
const DecodeTable* decode_tables(Codec codec);

// The value of a code, NaN codes included, by exp2 in double. e2m1: the sign is bit 7 (see pack_codes).
float decode_exact(Codec codec, float amax, uint8_t meta, uint8_t code);

// FP8 and e2m1 codes of y = log2(2^y) without exp2. y counts buckets of 1/buckets_per_octave from y0 on; every bucket holds at most
// one rounding boundary, so code = (Y + entry[bucket]) >> kFraction, Y in fixed point: the carry is the comparison.
constexpr int kFraction = 14;
constexpr float kFixedMagic = 8388608.0f;  // 2^23: a float32 in [2^23, 2^24) has its integer in the low bits

struct alignas(64) BucketTable {
  int32_t low[32];     // by bucket, up to the subnormal codes' end
  int32_t normal[16];  // periodic, an octave or several
  int32_t low_end;     // first Y, as bits of kFixedMagic + Y, that the periodic table serves
  float buckets_per_octave;
  float top;     // Y of amax
  float lowest;  // kFixedMagic + Y of an element that takes code 1
};

const BucketTable& bucket_table(Codec codec);

// log8, stochastic: what is added to kFixedMagic + Y (one code = 1 << kFraction) so that the fraction, under 8 random bits,
// carries with probability p(f); indexed by the fraction's top five bits. Takes kFixedMagic off.
struct alignas(64) DitherTable {
  int32_t entry[32];
};

const DitherTable* dither_tables();

}  // namespace coat
