#pragma once

#include <pybind11/pybind11.h>

// Addresses travel as integers.
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Adds CameJob and came_8bit to the module.
void bind_came(pybind11::module_& m);
