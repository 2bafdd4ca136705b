// Bindings of norms, norms with rotary embedding and gated residuals. Address 0 stands for an array that is not there.
#include "bind_norm.h"

#include "bind.h"
#include "bind_activation_quant.h"
#include "cpu/launch_norm.h"

namespace py = pybind11;

namespace {

coat::DType dtype_of(int number) { return static_cast<coat::DType>(number); }

coat::FloatArray array(uintptr_t data, int dtype) { return {pointer<const void>(data), dtype_of(dtype)}; }

void norm(uintptr_t x, int dtype, int64_t rows, int64_t row, uintptr_t gain, int gain_dtype, uintptr_t shift, int shift_dtype,
          bool plus_one, int64_t segment_rows, bool center, float eps, int fmt, int group_size, uintptr_t y, uintptr_t codes,
          uintptr_t scale, uintptr_t rstd, uintptr_t y_amax, int threads) {
  check_scaled(fmt, group_size, true);
  const coat::NormJob job{pointer<const void>(x),
                          dtype_of(dtype),
                          rows,
                          row,
                          {array(gain, gain_dtype), array(shift, shift_dtype), plus_one, segment_rows},
                          center,
                          eps,
                          fmt,
                          group_size,
                          pointer<void>(y),
                          pointer<void>(codes),
                          pointer<float>(scale),
                          pointer<float>(rstd),
                          pointer<float>(y_amax)};
  const py::gil_scoped_release release;
  coat::norm(job, threads);
}

void norm_from_codes(uintptr_t codes, int codes_dtype, uintptr_t scale, int64_t rows, int64_t row, uintptr_t gain, int gain_dtype,
                     uintptr_t shift, int shift_dtype, bool plus_one, int64_t segment_rows, int fmt, int group_size, uintptr_t y, int dtype,
                     int threads) {
  check_scaled(fmt, group_size, true);
  const coat::NormFromCodesJob job{pointer<const void>(codes),
                                   pointer<const float>(scale),
                                   dtype_of(codes_dtype),
                                   rows,
                                   row,
                                   {array(gain, gain_dtype), array(shift, shift_dtype), plus_one, segment_rows},
                                   fmt,
                                   group_size,
                                   pointer<void>(y),
                                   dtype_of(dtype)};
  const py::gil_scoped_release release;
  coat::norm_from_codes(job, threads);
}

void norm_backward(uintptr_t dy, int dtype, int64_t rows, int64_t row, uintptr_t codes, int codes_dtype, uintptr_t scale, uintptr_t rstd,
                   uintptr_t gain, int gain_dtype, bool plus_one, int64_t segment_rows, bool center, int fmt, int group_size,
                   int64_t segments, uintptr_t dx, uintptr_t dgain, uintptr_t dshift, int threads) {
  check_scaled(fmt, group_size, true);
  const coat::NormBackwardJob job{pointer<const void>(dy),
                                  dtype_of(dtype),
                                  rows,
                                  row,
                                  pointer<const void>(codes),
                                  pointer<const float>(scale),
                                  dtype_of(codes_dtype),
                                  pointer<const float>(rstd),
                                  {array(gain, gain_dtype), array(0, 0), plus_one, segment_rows},
                                  center,
                                  fmt,
                                  group_size,
                                  pointer<void>(dx)};
  const py::gil_scoped_release release;
  coat::norm_backward(job, segments, pointer<float>(dgain), pointer<float>(dshift), threads);
}

coat::NormRopeShape norm_rope_shape(int dtype, int64_t rows, int64_t row, int64_t heads, int64_t tokens, uintptr_t weight, int weight_dtype,
                                    uintptr_t first_weight, int first_weight_dtype, int64_t first_tokens, uintptr_t cos, uintptr_t sin,
                                    int table_dtype, int64_t table_tokens, bool interleaved) {
  return {dtype_of(dtype),
          rows,
          row,
          heads,
          tokens,
          array(weight, weight_dtype),
          array(first_weight, first_weight_dtype),
          first_tokens,
          array(cos, table_dtype),
          array(sin, table_dtype),
          table_tokens,
          interleaved};
}

void norm_rope(const coat::NormRopeShape& shape, uintptr_t x, float eps, uintptr_t y, uintptr_t rstd, int threads) {
  const coat::NormRopeJob job{shape, pointer<const void>(x), eps, pointer<void>(y), pointer<float>(rstd)};
  const py::gil_scoped_release release;
  coat::norm_rope(job, threads);
}

void norm_rope_backward(const coat::NormRopeShape& shape, uintptr_t dy, uintptr_t y, uintptr_t rstd, uintptr_t dx, uintptr_t dweight,
                        uintptr_t dfirst_weight, int threads) {
  const coat::NormRopeBackwardJob job{shape, pointer<const void>(dy), pointer<const void>(y), pointer<const float>(rstd),
                                      pointer<void>(dx)};
  const py::gil_scoped_release release;
  coat::norm_rope_backward(job, pointer<float>(dweight), pointer<float>(dfirst_weight), threads);
}

void gated_residual(uintptr_t residual, uintptr_t x, int dtype, int64_t rows, int64_t row, int64_t segment_rows, uintptr_t gate,
                    int gate_dtype, int fmt, int group_size, uintptr_t y, uintptr_t codes, uintptr_t scale, int threads) {
  check_scaled(fmt, group_size, true);
  const coat::GatedResidualJob job{pointer<const void>(residual),
                                   pointer<const void>(x),
                                   dtype_of(dtype),
                                   rows,
                                   row,
                                   segment_rows,
                                   array(gate, gate_dtype),
                                   fmt,
                                   group_size,
                                   pointer<void>(y),
                                   pointer<void>(codes),
                                   pointer<float>(scale)};
  const py::gil_scoped_release release;
  coat::gated_residual(job, threads);
}

void gated_residual_backward(uintptr_t dy, int dtype, int64_t rows, int64_t row, int64_t segments, uintptr_t gate, int gate_dtype,
                             uintptr_t codes, uintptr_t scale, int codes_dtype, int fmt, int group_size, uintptr_t dx, uintptr_t dgate,
                             int threads) {
  check_scaled(fmt, group_size, true);
  const coat::GatedResidualBackwardJob job{pointer<const void>(dy),
                                           dtype_of(dtype),
                                           rows,
                                           row,
                                           segments,
                                           array(gate, gate_dtype),
                                           pointer<const void>(codes),
                                           pointer<const float>(scale),
                                           dtype_of(codes_dtype),
                                           fmt,
                                           group_size,
                                           pointer<void>(dx)};
  const py::gil_scoped_release release;
  coat::gated_residual_backward(job, pointer<float>(dgate), threads);
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("norm", &norm, "x [rows, row] -> y, and xhat as codes and scale, rstd [rows], the maxima of y's groups.", py::kw_only(),
        py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("row"), py::arg("gain"), py::arg("gain_dtype"), py::arg("shift"),
        py::arg("shift_dtype"), py::arg("plus_one"), py::arg("segment_rows"), py::arg("center"), py::arg("eps"), py::arg("fmt"),
        py::arg("group_size"), py::arg("y"), py::arg("codes"), py::arg("scale"), py::arg("rstd"), py::arg("y_amax"), py::arg("threads"));
  m.def("norm_from_codes", &norm_from_codes, "codes, scale -> y.", py::kw_only(), py::arg("codes"), py::arg("codes_dtype"),
        py::arg("scale"), py::arg("rows"), py::arg("row"), py::arg("gain"), py::arg("gain_dtype"), py::arg("shift"), py::arg("shift_dtype"),
        py::arg("plus_one"), py::arg("segment_rows"), py::arg("fmt"), py::arg("group_size"), py::arg("y"), py::arg("dtype"),
        py::arg("threads"));
  m.def("norm_backward", &norm_backward, "dy, codes, scale, rstd -> dx, dgain and dshift [segments, row].", py::kw_only(), py::arg("dy"),
        py::arg("dtype"), py::arg("rows"), py::arg("row"), py::arg("codes"), py::arg("codes_dtype"), py::arg("scale"), py::arg("rstd"),
        py::arg("gain"), py::arg("gain_dtype"), py::arg("plus_one"), py::arg("segment_rows"), py::arg("center"), py::arg("fmt"),
        py::arg("group_size"), py::arg("segments"), py::arg("dx"), py::arg("dgain"), py::arg("dshift"), py::arg("threads"));
  py::class_<coat::NormRopeShape>(m, "NormRopeShape", "What norm_rope and norm_rope_backward are told of their tensors.")
      .def(py::init(&norm_rope_shape), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("row"), py::arg("heads"),
           py::arg("tokens"), py::arg("weight"), py::arg("weight_dtype"), py::arg("first_weight"), py::arg("first_weight_dtype"),
           py::arg("first_tokens"), py::arg("cos"), py::arg("sin"), py::arg("table_dtype"), py::arg("table_tokens"),
           py::arg("interleaved"));
  m.def("norm_rope", &norm_rope, "x [rows, row] -> y, rstd [rows].", py::arg("shape"), py::kw_only(), py::arg("x"), py::arg("eps"),
        py::arg("y"), py::arg("rstd"), py::arg("threads"));
  m.def("norm_rope_backward", &norm_rope_backward, "dy, y, rstd -> dx, dweight and dfirst_weight [row].", py::arg("shape"), py::kw_only(),
        py::arg("dy"), py::arg("y"), py::arg("rstd"), py::arg("dx"), py::arg("dweight"), py::arg("dfirst_weight"), py::arg("threads"));
  m.def("gated_residual", &gated_residual, "residual, x [rows, row], gate -> y, and x as codes and scale.", py::kw_only(),
        py::arg("residual"), py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("row"), py::arg("segment_rows"), py::arg("gate"),
        py::arg("gate_dtype"), py::arg("fmt"), py::arg("group_size"), py::arg("y"), py::arg("codes"), py::arg("scale"), py::arg("threads"));
  m.def("gated_residual_backward", &gated_residual_backward, "dy, codes, scale, gate -> dx, dgate [segments, row].", py::kw_only(),
        py::arg("dy"), py::arg("dtype"), py::arg("rows"), py::arg("row"), py::arg("segments"), py::arg("gate"), py::arg("gate_dtype"),
        py::arg("codes"), py::arg("scale"), py::arg("codes_dtype"), py::arg("fmt"), py::arg("group_size"), py::arg("dx"), py::arg("dgate"),
        py::arg("threads"));
}
