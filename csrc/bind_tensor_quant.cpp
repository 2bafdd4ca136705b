// Bindings of two-stage group scaling.
#include "bind_tensor_quant.h"

#include "bind.h"
#include "bind_activation_quant.h"
#include "cpu/tensor_quant.h"

namespace py = pybind11;

namespace {

int check_single(int fmt) {
  if (fmt == static_cast<int>(coat::ScaledFormat::kAuto))
    throw py::value_error("one scale for many groups has no bit for a choice of format");
  return check_scaled(fmt, coat::kMinRowGroup).fmt;
}

void group_amax(uintptr_t x, int x_dtype, int64_t rows, int64_t row, int group_size, uintptr_t amax, int threads) {
  check_scaled(static_cast<int>(coat::ScaledFormat::kE4M3), group_size);
  const coat::GroupAmaxJob job{pointer<const void>(x), static_cast<coat::DType>(x_dtype), rows, row, group_size, pointer<float>(amax)};
  const py::gil_scoped_release release;
  coat::group_amax(job, threads);
}

void quantize_tensor(uintptr_t x, int x_dtype, int64_t rows, int64_t row, uintptr_t amax, int64_t groups, int fmt, uintptr_t codes,
                     uintptr_t scale, int threads) {
  const coat::QuantizeTensorJob job{check_single(fmt),
                                    pointer<const void>(x),
                                    static_cast<coat::DType>(x_dtype),
                                    rows,
                                    row,
                                    pointer<const float>(amax),
                                    groups,
                                    pointer<uint8_t>(codes),
                                    nullptr};
  const py::gil_scoped_release release;
  coat::quantize_tensor(job, pointer<float>(scale), threads);
}

void dequantize_tensor(uintptr_t codes, uintptr_t scale, int64_t rows, int64_t row, int fmt, uintptr_t out, int out_dtype, int threads) {
  const coat::DequantizeTensorJob job{check_single(fmt),  pointer<const uint8_t>(codes),      pointer<const float>(scale), rows, row,
                                      pointer<void>(out), static_cast<coat::DType>(out_dtype)};
  const py::gil_scoped_release release;
  coat::dequantize_tensor(job, threads);
}

void transpose_bytes(uintptr_t bytes, int64_t rows, int64_t columns, uintptr_t out, int threads) {
  const coat::TransposeJob job{pointer<const uint8_t>(bytes), rows, columns, pointer<uint8_t>(out)};
  const py::gil_scoped_release release;
  coat::transpose_bytes(job, threads);
}

}  // namespace

void bind_tensor_quant(py::module_& m) {
  m.def("group_amax", &group_amax, "Largest finite magnitude of each group of x [rows, row].", py::arg("x"), py::arg("x_dtype"),
        py::arg("rows"), py::arg("row"), py::arg("group_size"), py::arg("amax"), py::arg("threads"));
  m.def("quantize_tensor", &quantize_tensor, "x [rows, row], amax [rows, groups] -> codes [rows, row], scale [rows].", py::arg("x"),
        py::arg("x_dtype"), py::arg("rows"), py::arg("row"), py::arg("amax"), py::arg("groups"), py::arg("fmt"), py::arg("codes"),
        py::arg("scale"), py::arg("threads"));
  m.def("dequantize_tensor", &dequantize_tensor, "codes [rows, row], scale [rows] -> out [rows, row].", py::arg("codes"), py::arg("scale"),
        py::arg("rows"), py::arg("row"), py::arg("fmt"), py::arg("out"), py::arg("out_dtype"), py::arg("threads"));
  m.def("transpose_bytes", &transpose_bytes, "bytes [rows, columns] -> out [columns, rows].", py::arg("bytes"), py::arg("rows"),
        py::arg("columns"), py::arg("out"), py::arg("threads"));
}
