// Memory bound: the baseline instruction set is fast enough for one source.
#include "launch_magnitudes.h"

#include <cmath>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace coat {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements of one partial sum
constexpr int kSums = 32;            // independent float32 sums, which add up to 512 elements each

template <typename Load>
double sum_chunk(int64_t n, Load load) {
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; ++j) sums[j] += std::fabs(load(i + j));
  }
  for (; i < n; ++i) sums[0] += std::fabs(load(i));
  return std::accumulate(sums, sums + kSums, 0.0);
}

double sum_chunk(const void* x, DType dtype, int64_t first, int64_t n) {
  if (dtype == DType::kFloat32) {
    const float* const values = static_cast<const float*>(x) + first;
    return sum_chunk(n, [values](int64_t i) { return values[i]; });
  }
  const uint16_t* const halves = static_cast<const uint16_t*>(x) + first;
  if (dtype == DType::kBFloat16) {
    return sum_chunk(n, [halves](int64_t i) { return from_bfloat16(halves[i]); });
  }
  return sum_chunk(n, [halves](int64_t i) { return from_float16(halves[i]); });
}

struct Chunk {
  const void* array;
  int64_t first, count;
};

}  // namespace

double sum_magnitudes(const int64_t* tensors, int64_t n_tensors, DType dtype, int threads) {
  std::vector<Chunk> chunks;
  int64_t elements = 0;
  for (int64_t t = 0; t < n_tensors; ++t) {
    const int64_t numel = tensors[2 * t + 1];
    elements += numel;
    for (int64_t first = 0; first < numel; first += kChunk) {
      chunks.push_back({pointer<const void>(tensors[2 * t]), first, std::min(kChunk, numel - first)});
    }
  }
  std::vector<double> sums(chunks.size());
  parallel(static_cast<int64_t>(chunks.size()), elements, threads, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      sums[i] = sum_chunk(chunks[i].array, dtype, chunks[i].first, chunks[i].count);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace coat
