// What the bindings share.
#pragma once

#include <cstdint>

// Addresses travel as integers.
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
