// Two-stage group scaling. Compiled once for each instruction set.
#include "convert.h"
#include "scaled8.h"

namespace coat::COAT_ISA {
namespace {

constexpr int kPad = 64;  // elements: a multiple of every kLanes

constexpr int padded(int elements) { return (elements + kPad - 1) / kPad * kPad; }

// Up to kBlock elements of x as floats, zeros behind them up to a multiple of kPad; x itself where that is what it is.
COAT_SIMD_INLINE const float* staged_floats(const void* x, DType dtype, int64_t first, int elements, float* staged) {
  const void* const from = at(x, dtype, first);
  prefetch_next(from, elements * dtype_size(dtype));
  if (dtype == DType::kFloat32 && elements % kPad == 0) return static_cast<const float*>(from);
  load_floats(from, dtype, elements, padded(elements), staged);
  return staged;
}

// Non-finite elements and magnitudes above amax, which a producer's maxima may have missed: x as zeros and ±amax, then the codes of NaN.
static inline void encode_beyond(int fmt, const float* x, int n, float amax, uint8_t* codes) {
  alignas(64) float held[kBlock] = {};
  for (int i = 0; i < n; ++i) held[i] = !is_finite(x[i]) ? 0.0f : x[i] > amax ? amax : x[i] < -amax ? -amax : x[i];
  encode_under(fmt, held, n, amax, codes);
  for (int i = 0; i < n; ++i) {
    if (!is_finite(x[i])) codes[i] = scaled_nan_code(fmt);
  }
}

}  // namespace

void group_amax(const GroupAmaxJob& job, int64_t begin, int64_t end) {
  alignas(64) float staged[kBlock];
  const int size = job.group_size;
  for_pieces(job.row, size, begin, end, [&](int64_t first, int elements, int64_t group) {
    const float* const x = staged_floats(job.x, job.x_dtype, first, elements, staged);
    for (int i = 0; i < elements; i += size) {
      const int n = elements - i < size ? (elements - i + kLanes - 1) / kLanes * kLanes : size;
      const uint32_t top = largest_bits(x + i, n);
      job.group_amax[group + i / size] = bits_float(top < kInfBits ? top : largest_finite_bits(x + i, n));
    }
  });
}

void quantize_tensor(const QuantizeTensorJob& job, int64_t begin, int64_t end) {
  alignas(64) float staged[kBlock];
  alignas(64) uint8_t tail[kBlock];
  for_pieces(job.row, kBlock, begin, end, [&](int64_t first, int elements, int64_t) {
    const float* const x = staged_floats(job.x, job.x_dtype, first, elements, staged);
    const float amax = job.amax[first / job.row];
    const int n = padded(elements);
    uint8_t* const codes = n == elements ? job.codes + first : tail;
    if (largest_bits(x, n) <= float_bits(amax)) {
      encode_under(job.fmt, x, n, amax, codes);
    } else {
      encode_beyond(job.fmt, x, n, amax, codes);
    }
    if (n != elements) memcpy(job.codes + first, tail, static_cast<size_t>(elements));
  });
}

void dequantize_tensor(const DequantizeTensorJob& job, int64_t begin, int64_t end) {
  alignas(64) float staged[kBlock];
  alignas(64) uint8_t tail[kBlock];
  for_pieces(job.row, kBlock, begin, end, [&](int64_t first, int elements, int64_t) {
    void* const to = at(job.out, job.out_dtype, first);
    const int n = padded(elements);
    const uint8_t* codes = job.codes + first;
    prefetch_next(codes, elements);
    if (n != elements) {
      memcpy(tail, codes, static_cast<size_t>(elements));
      memset(tail + elements, 0, static_cast<size_t>(n - elements));
      codes = tail;
    }
    const bool direct = job.out_dtype == DType::kFloat32 && n == elements;
    decode_group8(job.fmt, codes, n, job.scale[first / job.row], direct ? static_cast<float*>(to) : staged);
    if (!direct) store_floats(staged, elements, job.out_dtype, to);
  });
}

namespace {

// Swaps `shift` bytes of a and b: the upper ones of each with the lower ones of the other, within fields of 2 * shift bytes.
COAT_SIMD_INLINE void swap_fields(uint64_t* a, uint64_t* b, int shift, uint64_t low) {
  const uint64_t moved = ((*a >> shift) ^ *b) & low;
  *a ^= moved << shift;
  *b ^= moved;
}

// 8 x 8 bytes: three rounds of exchanges between rows 4, 2 and 1 apart.
COAT_SIMD_INLINE void transpose_8x8(const uint8_t* in, int64_t in_stride, uint8_t* out, int64_t out_stride) {
  uint64_t rows[8];
  for (int i = 0; i < 8; ++i) memcpy(rows + i, in + i * in_stride, 8);
  for (int i = 0; i < 4; ++i) swap_fields(rows + i, rows + i + 4, 32, 0x00000000FFFFFFFFu);
  for (int i = 0; i < 8; i += i % 4 == 1 ? 3 : 1) swap_fields(rows + i, rows + i + 2, 16, 0x0000FFFF0000FFFFu);
  for (int i = 0; i < 8; i += 2) swap_fields(rows + i, rows + i + 1, 8, 0x00FF00FF00FF00FFu);
  for (int i = 0; i < 8; ++i) memcpy(out + i * out_stride, rows + i, 8);
}

}  // namespace

// Units are stripes of kTransposeTile rows.
void transpose_bytes(const TransposeJob& job, int64_t begin, int64_t end) {
  const int64_t last_row = end * kTransposeTile < job.rows ? end * kTransposeTile : job.rows;
  for (int64_t row = begin * kTransposeTile; row < last_row; row += kTransposeTile) {
    const int64_t row_end = row + kTransposeTile < last_row ? row + kTransposeTile : last_row;
    for (int64_t column = 0; column < job.columns; column += kTransposeTile) {
      const int64_t column_end = column + kTransposeTile < job.columns ? column + kTransposeTile : job.columns;
      for (int64_t r = row; r < row_end; r += 8) {
        for (int64_t c = column; c < column_end; c += 8) {
          if (r + 8 <= row_end && c + 8 <= column_end) {
            transpose_8x8(job.bytes + r * job.columns + c, job.columns, job.out + c * job.rows + r, job.rows);
            continue;
          }
          for (int64_t i = r; i < r + 8 && i < row_end; ++i) {
            for (int64_t j = c; j < c + 8 && j < column_end; ++j) job.out[j * job.rows + i] = job.bytes[i * job.columns + j];
          }
        }
      }
    }
  }
}

}  // namespace coat::COAT_ISA
