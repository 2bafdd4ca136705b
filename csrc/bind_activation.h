#pragma once

#include <pybind11/pybind11.h>

// Adds the activation functions to the module.
void bind_activation(pybind11::module_& m);
