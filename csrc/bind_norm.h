#pragma once

#include <pybind11/pybind11.h>

// Adds norms, norms with rotary embedding and gated residuals to the module.
void bind_norm(pybind11::module_& m);
