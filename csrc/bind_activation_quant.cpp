// Bindings of quantize and dequantize in groups of a row.
#include "bind_activation_quant.h"

#include "bind.h"
#include "cpu/activation_quant.h"

namespace py = pybind11;

coat::Scaled8 check_scaled(int fmt, int group_size, bool allow_none) {
  if (fmt < (allow_none ? 0 : 1) || fmt > static_cast<int>(coat::ScaledFormat::kAuto)) {
    throw py::value_error("unknown activation format number " + std::to_string(fmt) +
                          "; numbers are FORMAT_INDEX of coat_kernels.formats.scaled8");
  }
  if (group_size < coat::kMinRowGroup || group_size > coat::kMaxRowGroup || (group_size & (group_size - 1)) != 0) {
    throw py::value_error("group size " + std::to_string(group_size) + " is not offered; choose one of 16, 32, 64, 128, 256");
  }
  return {fmt, group_size};
}

namespace {

void quantize_activation(uintptr_t x, int x_dtype, int64_t rows, int64_t row, int fmt, int group_size, uintptr_t codes, uintptr_t scale,
                         int threads) {
  const coat::QuantizeActivationJob job{check_scaled(fmt, group_size), pointer<const void>(x), static_cast<coat::DType>(x_dtype), rows, row,
                                        pointer<uint8_t>(codes),       pointer<float>(scale)};
  const py::gil_scoped_release release;
  coat::quantize_activation(job, threads);
}

void dequantize_activation(uintptr_t codes, uintptr_t scale, int64_t rows, int64_t row, int fmt, int group_size, uintptr_t out,
                           int out_dtype, int threads) {
  const coat::DequantizeActivationJob job{
      check_scaled(fmt, group_size),      pointer<const uint8_t>(codes), pointer<const float>(scale), rows, row, pointer<void>(out),
      static_cast<coat::DType>(out_dtype)};
  const py::gil_scoped_release release;
  coat::dequantize_activation(job, threads);
}

}  // namespace

void bind_activation_quant(py::module_& m) {
  m.def("quantize_activation", &quantize_activation, "x [rows, row] -> codes [rows, row], scale [rows, groups of a row].", py::arg("x"),
        py::arg("x_dtype"), py::arg("rows"), py::arg("row"), py::arg("fmt"), py::arg("group_size"), py::arg("codes"), py::arg("scale"),
        py::arg("threads"));
  m.def("dequantize_activation", &dequantize_activation, "codes, scale -> out [rows, row].", py::arg("codes"), py::arg("scale"),
        py::arg("rows"), py::arg("row"), py::arg("fmt"), py::arg("group_size"), py::arg("out"), py::arg("out_dtype"), py::arg("threads"));
}
