#pragma once

#include <pybind11/pybind11.h>

// Adds group_amax, quantize_tensor, dequantize_tensor and transpose_bytes to the module.
void bind_tensor_quant(pybind11::module_& m);
