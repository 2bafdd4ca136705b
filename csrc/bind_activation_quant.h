#pragma once

#include <pybind11/pybind11.h>

#include "formats/scaled8.h"

// Throws ValueError unless the numbers name a scaled format (`none` too where that is allowed) and a group size.
coat::Scaled8 check_scaled(int fmt, int group_size, bool allow_none = false);

// Adds quantize_activation and dequantize_activation to the module.
void bind_activation_quant(pybind11::module_& m);
