// Binding of the activation functions.
#include "bind_activation.h"

#include "bind.h"
#include "bind_activation_quant.h"
#include "cpu/activation.h"

namespace py = pybind11;

namespace {

coat::ActivationOperand operand(uintptr_t values, int64_t stride, uintptr_t codes, uintptr_t scale) {
  return {pointer<const void>(values), stride, pointer<uint8_t>(codes), pointer<float>(scale)};
}

void activation(int kind, int fmt, int group_size, int64_t rows, int64_t width, int value_dtype, int dtype, uintptr_t gate,
                int64_t gate_stride, uintptr_t gate_codes, uintptr_t gate_scale, uintptr_t up, int64_t up_stride, uintptr_t up_codes,
                uintptr_t up_scale, uintptr_t dy, uintptr_t out, uintptr_t out_amax, bool gate_first, int threads) {
  const coat::ActivationJob job{static_cast<coat::Activation>(kind),
                                check_scaled(fmt, group_size, true),
                                rows,
                                width,
                                static_cast<coat::DType>(value_dtype),
                                static_cast<coat::DType>(dtype),
                                operand(gate, gate_stride, gate_codes, gate_scale),
                                operand(up, up_stride, up_codes, up_scale),
                                pointer<const void>(dy),
                                pointer<void>(out),
                                pointer<float>(out_amax),
                                gate_first};
  const py::gil_scoped_release release;
  coat::activation(job, threads);
}

}  // namespace

void bind_activation(py::module_& m) {
  m.def("activation", &activation,
        "out = f(gate) up, or its gradients for dy; operands are read from values, or without them from codes, which are else written. "
        "Addresses may be 0 for what there is not.",
        py::kw_only(), py::arg("kind"), py::arg("fmt"), py::arg("group_size"), py::arg("rows"), py::arg("width"), py::arg("value_dtype"),
        py::arg("dtype"), py::arg("gate"), py::arg("gate_stride"), py::arg("gate_codes"), py::arg("gate_scale"), py::arg("up") = 0,
        py::arg("up_stride") = 0, py::arg("up_codes") = 0, py::arg("up_scale") = 0, py::arg("dy") = 0, py::arg("out"),
        py::arg("out_amax") = 0, py::arg("gate_first") = true, py::arg("threads"));
}
