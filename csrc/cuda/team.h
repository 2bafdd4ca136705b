// A team of threads that works on one tensor: a thread block, or all blocks of a cooperative launch. Its sums are taken in a fixed order.
#pragma once

#include "elements.h"

namespace coat {

// Global memory that a team's blocks talk through: a counter, zero at launch, and two turns of one partial sum a block.
struct Meeting {
  unsigned* arrived;
  double* partial;  // [2][blocks]
};

struct Team {
  int block, blocks;  // of this team
  Meeting meeting;
  unsigned rounds;
  int turn;
  double* shared;  // [kThreads]

  __device__ int64_t rank() const { return static_cast<int64_t>(block) * kThreads + threadIdx.x; }
  __device__ int64_t size() const { return static_cast<int64_t>(blocks) * kThreads; }

  // What any thread of the team wrote before is read by all after.
  __device__ void barrier() {
    __syncthreads();
    if (blocks == 1) return;
    rounds += 1;
    meet(meeting.arrived, rounds * static_cast<unsigned>(blocks));
  }

  // Waits until `arrived` reaches `goal`. Shared memory may be another's afterwards, in the emulator at least.
  __device__ static void meet(unsigned* arrived, unsigned goal) {
#ifdef __CUDA_ARCH__
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1u);
      while (*static_cast<volatile unsigned*>(arrived) < goal) {
      }
      __threadfence();
    }
    __syncthreads();
#else
    static_cast<void>(arrived);
    static_cast<void>(goal);
    emulate_grid_barrier();
#endif
  }

  __device__ double block_sum(double x) {
    __syncthreads();
    shared[threadIdx.x] = x;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    return shared[0];
  }

  // The sum over all threads, for each of them; a barrier too.
  __device__ double sum(double x) {
    x = block_sum(x);
    if (blocks == 1) return x;
    if (threadIdx.x == 0) meeting.partial[turn * blocks + block] = x;
    barrier();
    double all = 0;
    for (int i = static_cast<int>(threadIdx.x); i < blocks; i += kThreads) all += meeting.partial[turn * blocks + i];
    turn ^= 1;
    return block_sum(all);
  }
};

__device__ inline float warp_sum(float x) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += bits_float(__shfl_xor_sync(kEveryLane, float_bits(x), lane));
  return x;
}

// Calls body(i, row, col) for the elements i of a matrix that are this thread's: neighbours are neighbouring threads'.
template <typename Body>
__device__ inline void for_elements(const Team& team, int64_t rows, int64_t cols, Body body) {
  const int64_t step_rows = team.size() / cols, step_cols = team.size() % cols;
  int64_t row = team.rank() / cols, col = team.rank() % cols;
  for (int64_t i = team.rank(); i < rows * cols; i += team.size()) {
    body(i, row, col);
    row += step_rows;
    col += step_cols;
    if (col >= cols) {
      col -= cols;
      row += 1;
    }
  }
}

// Calls body(row) for each row with all lanes of one warp.
template <typename Body>
__device__ inline void for_rows(const Team& team, int64_t rows, Body body) {
  for (int64_t row = team.rank() / kWarp; row < rows; row += team.size() / kWarp) body(row);
}

// Sums of value(i, row, col) over a row, for all lanes of the warp that has it.
template <typename Value>
__device__ inline float row_sum(int64_t row, int64_t cols, Value value) {
  float sum = 0;
  for (int64_t col = threadIdx.x % kWarp; col < cols; col += kWarp) sum += value(row * cols + col, row, col);
  return warp_sum(sum);
}

// Sums over columns: partial ones of chunks of rows first. `partial` is [max(team.size(), cols)]; value(i, row, col) is summed, and
// done(col, sum) called once for each column. A barrier before and after.
template <typename Value, typename Done>
__device__ inline void column_sums(Team& team, int64_t rows, int64_t cols, float* partial, Value value, Done done) {
  const int64_t chunks = team.size() > cols ? team.size() / cols : 1;
  team.barrier();
  for (int64_t at = team.rank(); at < chunks * cols; at += team.size()) {
    const int64_t chunk = at / cols, col = at % cols;
    float sum = 0;
    for (int64_t row = chunk; row < rows; row += chunks) sum += value(row * cols + col, row, col);
    partial[at] = sum;
  }
  team.barrier();
  for (int64_t col = team.rank(); col < cols; col += team.size()) {
    float sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * cols + col];
    done(col, sum);
  }
  team.barrier();
}

}  // namespace coat
