// Runs csrc/cuda/*.cu on a CPU: every thread of a block is a fiber, switched at barriers and exchanges between lanes.
//
// What it shows: indices, masks, tails, arithmetic, who waits for whom. What it cannot: registers, memory ordering between threads that
// share no barrier, the special function unit. A warp runs as far as it can before the next one starts, in ascending or descending order,
// so that a missing barrier shows in one order or the other.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __frcp_rn(float x) { return 1.0f / x; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;
enum class State { kReady, kAtBlock, kAtWarp, kAtGrid, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  State state;
  bool started;
  int exchanges;
  std::unique_ptr<char[]> stack;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned> slots;  // [2][threads]: what lanes exchange; twice, as a lane may be one exchange ahead
  std::function<void()> body;
  jmp_buf scheduler;
  int current;
};
inline Block* block = nullptr;

[[noreturn]] inline void fail(const char* why) {
  fprintf(stderr, "emulator: %s (block %u, thread %u)\n", why, blockIdx.x, threadIdx.x);
  abort();
}

inline void wait(State state) {
  Fiber& fiber = block->fibers[static_cast<size_t>(block->current)];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(block->scheduler, 1);
}

inline void entry() {
  block->body();
  block->fibers[static_cast<size_t>(block->current)].state = State::kDone;
  _longjmp(block->scheduler, 1);
}

inline void resume(int index) {
  Fiber& fiber = block->fibers[static_cast<size_t>(index)];
  block->current = index;
  threadIdx.x = static_cast<unsigned>(index);
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Lets those go on that wait at `barrier` between the fibers begin and end, if all do. Threads that have left a block-wide barrier behind
// by returning would hang a GPU or not, as the architecture pleases: here they fail.
inline bool release(int begin, int end, State barrier) {
  int waiting = 0, done = 0;
  for (int i = begin; i < end; ++i) {
    waiting += block->fibers[static_cast<size_t>(i)].state == barrier;
    done += block->fibers[static_cast<size_t>(i)].state == State::kDone;
  }
  if (waiting == 0 || waiting + done < end - begin) return false;
  if (done > 0) fail("some threads wait for others that have returned");
  for (int i = begin; i < end; ++i) block->fibers[static_cast<size_t>(i)].state = State::kReady;
  return true;
}

inline void start_block() {
  for (Fiber& fiber : block->fibers) {
    if (!fiber.stack) {
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.start);
    }
    fiber.start.uc_stack = {fiber.stack.get(), 0, kStack};
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, entry, 0);
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.exchanges = 0;
  }
}

// Until all threads have returned, or wait for the other blocks of a cooperative launch; whether they have returned.
inline bool run_block(int threads, bool descending) {
  for (;;) {
    int done = 0, elsewhere = 0;
    bool moved = false;
    for (int k = 0; k < threads; k += kWarp) {
      const int warp = descending ? threads - kWarp - k : k;
      do {
        for (int j = 0; j < kWarp; ++j) {
          const int i = warp + (descending ? kWarp - 1 - j : j);
          if (block->fibers[static_cast<size_t>(i)].state != State::kReady) continue;
          moved = true;
          resume(i);
        }
      } while (release(warp, warp + kWarp, State::kAtWarp));
    }
    for (const Fiber& fiber : block->fibers) {
      done += fiber.state == State::kDone;
      elsewhere += fiber.state == State::kAtGrid;
    }
    if (done == threads || elsewhere == threads) return done == threads;
    if (!release(0, threads, State::kAtBlock) && !moved) fail("threads wait at different barriers");
  }
}

// Blocks run one after the other; those of a cooperative launch from one barrier of the grid to the next.
template <typename Arguments>
void run(void (*kernel)(Arguments), const void* arguments, int blocks, int threads, int descending) {
  static std::vector<Block> all;  // kept: new stacks for every launch are most of its time
  Arguments copy;
  memcpy(&copy, arguments, sizeof copy);
  if (all.size() < static_cast<size_t>(blocks)) all.resize(static_cast<size_t>(blocks));
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  std::vector<bool> returned(static_cast<size_t>(blocks));
  for (int left = blocks, round = 0; left > 0; ++round) {
    for (int i = 0; i < blocks; ++i) {
      if (returned[static_cast<size_t>(i)]) continue;
      block = &all[static_cast<size_t>(i)];
      blockIdx.x = static_cast<unsigned>(i);
      if (round == 0) {
        block->fibers.resize(static_cast<size_t>(threads));
        block->slots.resize(static_cast<size_t>(2 * threads));
        block->body = [&] { kernel(copy); };
        start_block();
      } else {
        for (Fiber& fiber : block->fibers) fiber.state = State::kReady;
      }
      returned[static_cast<size_t>(i)] = run_block(threads, descending != 0);
      left -= returned[static_cast<size_t>(i)];
    }
    if (left > 0 && left < blocks) fail("some blocks wait for others that have returned");
  }
  block = nullptr;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::kAtBlock); }
inline void __syncwarp() { emulator::wait(emulator::State::kAtWarp); }
inline void emulate_grid_barrier() { emulator::wait(emulator::State::kAtGrid); }

inline unsigned __shfl_xor_sync(unsigned mask, unsigned value, int lanes) {
  using emulator::block;
  if (mask != 0xFFFFFFFFu) emulator::fail("only exchanges of whole warps are emulated");
  const int me = block->current, threads = static_cast<int>(block->fibers.size());
  const int turn = block->fibers[static_cast<size_t>(me)].exchanges++ % 2;
  block->slots[static_cast<size_t>(turn * threads + me)] = value;
  emulator::wait(emulator::State::kAtWarp);
  return block->slots[static_cast<size_t>(turn * threads + (me ^ lanes))];
}

// The C functions that a launcher calls in place of the driver.
#define COAT_EMULATE(KERNEL, ARGUMENTS)                                                              \
  extern "C" size_t sizeof_##KERNEL() { return sizeof(ARGUMENTS); }                                  \
  extern "C" void emulate_##KERNEL(const void* arguments, int blocks, int threads, int descending) { \
    emulator::run<ARGUMENTS>(KERNEL, arguments, blocks, threads, descending);                        \
  }
