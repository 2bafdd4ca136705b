// Memory that kernels work in: on cache lines, allocated before any thread starts, where its absence can still be said.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace coat {

struct Release {
  void operator()(float* memory) const { operator delete(memory, std::align_val_t{64}); }
};
using Workspace = std::unique_ptr<float, Release>;

inline Workspace make_workspace(int64_t floats) {
  return Workspace(static_cast<float*>(operator new(static_cast<size_t>(floats) * sizeof(float), std::align_val_t{64})));
}

}  // namespace coat
