// Binding of the CAME step.
#include "bind_came.h"

#include <pybind11/stl.h>

#include "cpu/launch_came.h"
#include "cpu/launch_magnitudes.h"

namespace py = pybind11;

namespace {

// Enumerations and dtypes travel as their numbers.
template <typename Member>
auto as_number(Member coat::CameJob::* member) {
  return py::cpp_function([member](coat::CameJob& job, int number) { job.*member = static_cast<Member>(number); });
}

void came_8bit(uintptr_t table, int64_t n_tensors, uintptr_t numbers, uintptr_t tables, int64_t n_tables, const coat::CameJob& job,
               int threads) {
  const py::gil_scoped_release release;
  coat::came_8bit(pointer<const int64_t>(table), n_tensors, {pointer<const float>(numbers), pointer<const float>(tables), n_tables}, job,
                  threads);
}

double sum_magnitudes(uintptr_t tensors, int64_t n_tensors, int dtype, int threads) {
  const py::gil_scoped_release release;
  return coat::sum_magnitudes(pointer<const int64_t>(tensors), n_tensors, static_cast<coat::DType>(dtype), threads);
}

}  // namespace

void bind_came(py::module_& m) {
  using coat::CameJob;
  py::class_<CameJob>(m, "CameJob", "Settings of a CAME launch: write-only numbers, zero until set.")
      .def(py::init([] { return CameJob{}; }))
      .def_readwrite("amp", &CameJob::amp)
      .def_property("phase", nullptr, as_number(&CameJob::phase))
      .def_readwrite("use_8bit", &CameJob::use_8bit)
      .def_readwrite("block_size", &CameJob::block_size)
      .def_readwrite("came", &CameJob::came)
      .def_readwrite("edge_suppression", &CameJob::edge_suppression)
      .def_readwrite("background_regularization", &CameJob::background_regularization)
      .def_property("param_dtype", nullptr, as_number(&CameJob::param_dtype))
      .def_property("grad_dtype", nullptr, as_number(&CameJob::grad_dtype))
      .def_property("param_rounding", nullptr, as_number(&CameJob::param_rounding))
      .def_readwrite("seed", &CameJob::seed)
      .def_readwrite("beta2", &CameJob::beta2)
      .def_readwrite("beta3", &CameJob::beta3)
      .def_readwrite("eps1", &CameJob::eps1)
      .def_readwrite("eps2", &CameJob::eps2)
      .def_readwrite("clip_threshold", &CameJob::clip_threshold)
      .def_readwrite("weight_decay", &CameJob::weight_decay)
      .def_readwrite("grad_factor", &CameJob::grad_factor)
      .def_readwrite("inv_grad_l1", &CameJob::inv_grad_l1)
      .def_readwrite("min_lr", &CameJob::min_lr)
      .def_readwrite("max_lr", &CameJob::max_lr)
      .def_readwrite("lr_bump", &CameJob::lr_bump)
      .def_readwrite("adaptation_rate", &CameJob::adaptation_rate)
      .def_readwrite("edge_penalty", &CameJob::edge_penalty)
      .def_readwrite("edge_threshold", &CameJob::edge_threshold)
      .def_readwrite("frequency_penalty", &CameJob::frequency_penalty)
      .def_readwrite("rank_penalty_strength", &CameJob::rank_penalty_strength)
      .def_readwrite("low_rank_emphasis", &CameJob::low_rank_emphasis)
      .def_readwrite("detail_preservation", &CameJob::detail_preservation)
      .def_readwrite("eta", &CameJob::eta);
  m.def("came_8bit", &came_8bit, "One CAME step of every row of an int64 [n_tensors, 20] table, in place.", py::arg("table"),
        py::arg("n_tensors"), py::arg("numbers"), py::arg("tables"), py::arg("n_tables"), py::arg("job"), py::arg("threads"));
  m.def("sum_magnitudes", &sum_magnitudes, "Sum of |x| over the arrays of an int64 [n_tensors, 2] table of addresses and element counts.",
        py::arg("tensors"), py::arg("n_tensors"), py::arg("dtype"), py::arg("threads"));
}
