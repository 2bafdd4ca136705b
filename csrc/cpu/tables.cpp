#include "tables.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

namespace coat {
namespace {

// Value of a small float's finite code, NaN codes and those past the format's end read as if they were finite.
double code_value(const CodecSpec& spec, int magnitude_code) {
  const int exponent = magnitude_code >> spec.mantissa_bits, mantissa = magnitude_code & ((1 << spec.mantissa_bits) - 1);
  const int implicit = exponent > 0 ? 1 << spec.mantissa_bits : 0;
  return std::ldexp(static_cast<double>(implicit + mantissa), (exponent > 0 ? exponent : 1) - spec.bias - spec.mantissa_bits);
}

// log2(|value of a code| / max), before division by k; log8: in units of j/250 octave.
double code_log2(Codec codec, int magnitude_code) {
  if (codec == Codec::kLog8) return magnitude_code - 255;
  const CodecSpec spec = codec_spec(codec);
  return std::log2(code_value(spec, magnitude_code) / static_cast<double>(spec.max));
}

void fill_fp8(Codec codec, double k, DecodeTable* table) {
  const int top_high = 7, top_low = codec_spec(codec).max_code & 15;
  const auto log2_of = [&](int code) { return code_log2(codec, code) / k; };
  const double octaves = log2_of(3 * 16 + top_low) - log2_of(2 * 16 + top_low);
  for (int high = 0; high < 8; ++high) {
    // high = 0 continues the progression, so that `low` alone holds what breaks it: the subnormal codes
    const double log2_high = (high - top_high) * octaves;
    table->hi[high] = static_cast<float>(std::exp2(log2_high));
    table->hi[high + 8] = -table->hi[high];
  }
  for (int low = 0; low < 16; ++low) {
    table->lo[low] = static_cast<float>(std::exp2(log2_of(top_high * 16 + low)));
    table->low[low] = low == 0 ? 0.0f : static_cast<float>(std::exp2(log2_of(low) + top_high * octaves));
  }
}

void fill_e2m1(Codec codec, double k, DecodeTable* table) {
  for (int i = 0; i < 16; ++i) {
    table->hi[i] = i < 8 ? 1.0f : -1.0f;
    table->lo[i] = table->low[i] = i == 0 || i > 7 ? 0.0f : static_cast<float>(std::exp2(code_log2(codec, i) / k));
  }
}

void fill_log8(double octaves_per_code, DecodeTable* table) {
  for (int i = 0; i < 16; ++i) {
    table->hi[i] = static_cast<float>(std::exp2((i - 15) * 16 * octaves_per_code));
    table->lo[i] = static_cast<float>(std::exp2((i - 15) * octaves_per_code));
    table->low[i] = i == 0 ? 0.0f : table->lo[i];
  }
}

DecodeTable* make_decode_tables(Codec codec) {
  auto* tables = new DecodeTable[256];
  const CodecSpec spec = codec_spec(codec);
  for (int meta = 0; meta < 256; ++meta) {
    // 0 is never written; read it as 1 rather than divide by it
    const double value = meta > 0 ? meta : 1;
    double smallest;
    if (codec == Codec::kLog8) {
      fill_log8(value / 250, &tables[meta]);
      smallest = -254 * value / 250;
    } else {
      const double k = spec.expand ? value / 16 : 1.0;
      if (is_e2m1(codec)) {
        fill_e2m1(codec, k, &tables[meta]);
      } else {
        fill_fp8(codec, k, &tables[meta]);
      }
      smallest = code_log2(codec, 1) / k;
    }
    tables[meta].exact_below = smallest < -100 ? std::numeric_limits<float>::infinity() : static_cast<float>(std::exp2(-120 - smallest));
  }
  return tables;
}

// Kept until the process ends: 256 tables of 256 bytes for each codec in use.
template <Codec codec>
const DecodeTable* kept_decode_tables() {
  static const DecodeTable* const tables = make_decode_tables(codec);
  return tables;
}

// Origin of the buckets: in (0.0236, 0.0792] every bucket of e4m3 holds one boundary log2(1 + (2m + 1) / 16); in
// (-0.0406, 0.1569] every bucket of e5m2 does, in (-0.1781, 0.3073] every one of e2m1.
constexpr double kBucketOffset = 0.05;

BucketTable make_bucket_table(Codec codec) {
  const CodecSpec spec = codec_spec(codec);
  BucketTable table{};
  const int per_octave = 1 << spec.mantissa_bits, low_octaves = spec.mantissa_bits + 1;
  const int low_buckets = low_octaves * per_octave, one = 1 << kFraction;
  const int min_exponent = 1 - spec.bias;
  const double y0 = min_exponent - low_octaves + kBucketOffset;
  table.buckets_per_octave = static_cast<float>(per_octave);
  table.top = static_cast<float>((std::log2(static_cast<double>(spec.max)) - y0) * per_octave * one);
  const int32_t magic_bits = static_cast<int32_t>(float_bits(kFixedMagic));
  table.low_end = magic_bits + low_buckets * one;
  const auto boundary = [&](int code) {  // in buckets: where 2^y is halfway between code and code + 1
    return (std::log2((code_value(spec, code) + code_value(spec, code + 1)) / 2) - y0) * per_octave;
  };
  const auto entry = [&](int bucket) {
    int code = 0;
    while (boundary(code) < bucket) ++code;
    const double threshold = boundary(code) - bucket;
    const int carry = threshold < 1 ? one - static_cast<int>(std::lrint(threshold * one)) : 0;
    return (code - bucket) * one + carry - magic_bits;
  };
  for (int bucket = 0; bucket < low_buckets; ++bucket) table.low[bucket] = entry(bucket);
  for (int i = 0; i < 16; ++i) {
    const int bucket = low_buckets + (i - low_buckets % 16 + 16) % 16;
    table.normal[i] = entry(bucket);
  }
  table.lowest = kFixedMagic + static_cast<float>((min_exponent - spec.mantissa_bits - y0) * per_octave * one);
  return table;
}

DitherTable* make_dither_tables() {
  auto* tables = new DitherTable[256];
  for (int j = 0; j < 256; ++j) {
    const double bend = 4 * (0.5 - 1 / (1 + std::exp2(j / 500.0)));
    for (int i = 0; i < 32; ++i) {
      const double f = (i + 0.5) / 32;
      // half a unit of the 8 random bits: u = (r + 1/2) / 256
      const double correction = -bend * f * (1 - f) + 0.5 / 256;
      tables[j].entry[i] = static_cast<int32_t>(std::lrint(correction * (1 << kFraction))) - static_cast<int32_t>(float_bits(kFixedMagic));
    }
  }
  return tables;
}

}  // namespace

float decode_exact(Codec codec, float amax, uint8_t meta, uint8_t code) {
  const CodecSpec spec = codec_spec(codec);
  if (codec == Codec::kSoftsign8) {
    const int number = static_cast<int8_t>(code);
    return static_cast<float>(static_cast<double>(amax) * number / (254 - std::abs(number)));
  }
  const int magnitude = is_small_float(codec) ? code & 0x7F : code;
  if (magnitude == 0) return 0.0f;
  if (codec == Codec::kLog8) return static_cast<float>(static_cast<double>(amax) * std::exp2(code_log2(codec, code) * meta / 250));
  double value;
  if (magnitude > spec.max_code) {
    value = std::numeric_limits<double>::quiet_NaN();
  } else if (spec.expand) {
    value = static_cast<double>(amax) * std::exp2(code_log2(codec, magnitude) * 16 / (meta > 0 ? meta : 1));
  } else {
    value = code_value(spec, magnitude) * static_cast<double>(amax / spec.max);
  }
  return static_cast<float>(code & 0x80 ? -value : value);
}

const DecodeTable* decode_tables(Codec codec) {
  switch (codec) {
    case Codec::kE4M3:
      return kept_decode_tables<Codec::kE4M3>();
    case Codec::kE4M3Expand:
      return kept_decode_tables<Codec::kE4M3Expand>();
    case Codec::kE5M2:
      return kept_decode_tables<Codec::kE5M2>();
    case Codec::kE5M2Expand:
      return kept_decode_tables<Codec::kE5M2Expand>();
    case Codec::kLog8:
      return kept_decode_tables<Codec::kLog8>();
    case Codec::kE2M1:
      return kept_decode_tables<Codec::kE2M1>();
    case Codec::kE2M1Expand:
      return kept_decode_tables<Codec::kE2M1Expand>();
    default:
      return nullptr;
  }
}

const BucketTable& bucket_table(Codec codec) {
  static const BucketTable e4m3 = make_bucket_table(Codec::kE4M3), e5m2 = make_bucket_table(Codec::kE5M2),
                           e2m1 = make_bucket_table(Codec::kE2M1);
  if (is_e2m1(codec)) return e2m1;
  return codec_spec(codec).mantissa_bits == 3 ? e4m3 : e5m2;
}

const DitherTable* dither_tables() {
  static const DitherTable* const tables = make_dither_tables();
  return tables;
}

}  // namespace coat
