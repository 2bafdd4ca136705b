#pragma once

#include <pybind11/pybind11.h>

#include "bind.h"

// Adds CameJob and came_8bit to the module.
void bind_came(pybind11::module_& m);
