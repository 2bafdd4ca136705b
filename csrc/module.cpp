// coat_kernels._C: the CPU kernels, bound with addresses as integers. Arguments are checked in Python, by the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_activation.h"
#include "bind_activation_quant.h"
#include "bind_came.h"
#include "bind_norm.h"
#include "bind_tensor_quant.h"
#include "cpu/launch.h"

namespace py = pybind11;

namespace {

void check_codec(int codec, bool quantized_only) {
  const auto id = static_cast<coat::Codec>(codec);
  const bool known = codec >= 0 && codec < coat::kNumCodecs && id != coat::Codec::kDynamic8;
  if (known && (coat::is_quantized(id) || !quantized_only)) return;
  throw py::value_error("unknown codec number " + std::to_string(codec) + "; numbers are Codec.index of coat_kernels.formats");
}

void check_group_size(int group_size) {
  if (group_size == 32 || group_size == 64 || group_size == 128 || group_size == 256) return;
  throw py::value_error("group size " + std::to_string(group_size) + " is not offered; choose one of 32, 64, 128, 256");
}

void check_split(coat::ParamRounding rounding, coat::DType dtype) {
  if (rounding != coat::ParamRounding::kSplit || dtype == coat::DType::kBFloat16) return;
  throw py::value_error("param_rounding 'split' stores bfloat16 parameters with a residual; got dtype number " +
                        std::to_string(static_cast<int>(dtype)));
}

void quantize_group(uintptr_t x, int x_dtype, int64_t numel, int codec, bool is_signed, int group_size, bool stochastic, uint32_t key,
                    uintptr_t codes, uintptr_t amax, uintptr_t k16, int threads) {
  check_codec(codec, true);
  check_group_size(group_size);
  const auto id = static_cast<coat::Codec>(codec);
  const bool keep_nonzero = coat::codec_spec(id).expand || !is_signed;
  coat::QuantizeJob job{};
  job.format = coat::make_format(id, group_size, true, keep_nonzero, stochastic);
  job.x = pointer<const void>(x);
  job.x_dtype = static_cast<coat::DType>(x_dtype);
  job.numel = numel;
  job.key = key;
  job.codes = pointer<uint8_t>(codes);
  job.amax = pointer<float>(amax);
  job.k16 = pointer<uint8_t>(k16);
  const py::gil_scoped_release release;
  coat::quantize_group(job, threads);
}

void dequantize_group(uintptr_t codes, uintptr_t amax, uintptr_t k16, int64_t numel, int codec, int group_size, uintptr_t out,
                      int out_dtype, int threads) {
  check_codec(codec, true);
  check_group_size(group_size);
  coat::DequantizeJob job{};
  job.format = coat::make_format(static_cast<coat::Codec>(codec), group_size, true, false, false);
  job.codes = pointer<const uint8_t>(codes);
  job.amax = pointer<const float>(amax);
  job.k16 = pointer<const uint8_t>(k16);
  job.numel = numel;
  job.out = pointer<void>(out);
  job.out_dtype = static_cast<coat::DType>(out_dtype);
  const py::gil_scoped_release release;
  coat::dequantize_group(job, threads);
}

void adamw_fp8(uintptr_t table, int64_t n_tensors, int param_dtype, int grad_dtype, int exp_avg_codec, int exp_avg_sq_codec, int group_size,
               bool stochastic_exp_avg, bool stochastic_exp_avg_sq, int param_rounding, int64_t seed, double lr, double beta1, double beta2,
               double eps, double weight_decay, bool maximize, double grad_scale, int threads) {
  check_codec(exp_avg_codec, false);
  check_codec(exp_avg_sq_codec, false);
  check_group_size(group_size);
  coat::StepFormat format{};
  format.param_dtype = static_cast<coat::DType>(param_dtype);
  format.grad_dtype = static_cast<coat::DType>(grad_dtype);
  format.exp_avg = static_cast<coat::Codec>(exp_avg_codec);
  format.exp_avg_sq = static_cast<coat::Codec>(exp_avg_sq_codec);
  if (format.exp_avg == coat::Codec::kLog8) throw py::value_error("log8 holds no signs and cannot hold exp_avg; use e4m3 or e5m2");
  if (format.exp_avg_sq == coat::Codec::kSoftsign8)
    throw py::value_error("softsign8 is too narrow for exp_avg_sq; use e4m3_expand or log8");
  format.group_size = group_size;
  format.stochastic_exp_avg = stochastic_exp_avg;
  format.stochastic_exp_avg_sq = stochastic_exp_avg_sq;
  format.param_rounding = static_cast<coat::ParamRounding>(param_rounding);
  check_split(format.param_rounding, format.param_dtype);
  format.seed = static_cast<uint32_t>(seed);
  const coat::Hyperparameters hyper{lr, beta1, beta2, eps, weight_decay, maximize, grad_scale};
  const py::gil_scoped_release release;
  coat::adamw_fp8(pointer<const int64_t>(table), n_tensors, format, hyper, threads);
}

void check_block_size(int block_size) {
  if (block_size >= coat::kMinBlockSize && block_size <= coat::kMaxBlockSize && (block_size & (block_size - 1)) == 0) return;
  throw py::value_error("block size " + std::to_string(block_size) + " is not offered; choose a power of two from 64 to 4096");
}

void quantize_blockwise(uintptr_t x, int x_dtype, int64_t numel, int block_size, bool is_signed, uintptr_t codes, uintptr_t absmax,
                        int threads) {
  check_block_size(block_size);
  const coat::QuantizeBlockwiseJob job{&coat::dynamic8_tables(is_signed),
                                       is_signed,
                                       block_size,
                                       pointer<const void>(x),
                                       static_cast<coat::DType>(x_dtype),
                                       numel,
                                       pointer<uint8_t>(codes),
                                       pointer<float>(absmax)};
  const py::gil_scoped_release release;
  coat::quantize_blockwise(job, threads);
}

void dequantize_blockwise(uintptr_t codes, uintptr_t absmax, int64_t numel, int block_size, bool is_signed, uintptr_t out, int out_dtype,
                          int threads) {
  check_block_size(block_size);
  const coat::DequantizeBlockwiseJob job{&coat::dynamic8_tables(is_signed),  block_size, pointer<const uint8_t>(codes),
                                         pointer<const float>(absmax),       numel,      pointer<void>(out),
                                         static_cast<coat::DType>(out_dtype)};
  const py::gil_scoped_release release;
  coat::dequantize_blockwise(job, threads);
}

py::tuple dynamic8_tables(bool is_signed) {
  const coat::Dynamic8Tables& tables = coat::dynamic8_tables(is_signed);
  return py::make_tuple(std::vector<float>(std::begin(tables.map), std::end(tables.map)),
                        std::vector<uint32_t>(std::begin(tables.entry), std::end(tables.entry)));
}

void step_8bit(uintptr_t table, int64_t n_tensors, int param_dtype, int grad_dtype, int rule, bool quantized, int block_size,
               int param_rounding, int64_t seed, double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
               bool nesterov, double grad_scale, int threads) {
  check_block_size(block_size);
  coat::Step8bitFormat format{};
  format.rule = static_cast<coat::Rule>(rule);
  format.quantized = quantized;
  format.block_size = block_size;
  format.param_dtype = static_cast<coat::DType>(param_dtype);
  format.grad_dtype = static_cast<coat::DType>(grad_dtype);
  format.param_rounding = static_cast<coat::ParamRounding>(param_rounding);
  format.seed = static_cast<uint32_t>(seed);
  check_split(format.param_rounding, format.param_dtype);
  const coat::Step8bitHyperparameters hyper{lr, beta1, beta2, eps, weight_decay, maximize, nesterov, grad_scale};
  const py::gil_scoped_release release;
  coat::step_8bit(pointer<const int64_t>(table), n_tensors, format, hyper, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of coat_kernels. Addresses are integers; the ops in coat_kernels.ops check and own the memory.";
  m.def("isa", &coat::isa, "The instruction set in use: 'avx512', 'avx2' or 'generic'.");
  m.def("isas", &coat::isas, "The instruction sets that this processor has kernels for, best first.");
  m.def("use_isa", &coat::use_isa, py::arg("name"), "Use the kernels of this instruction set from now on.");
  m.def("quantize_group", &quantize_group, "x -> codes, amax [n_groups], k16 [n_groups].", py::arg("x"), py::arg("x_dtype"),
        py::arg("numel"), py::arg("codec"), py::arg("is_signed"), py::arg("group_size"), py::arg("stochastic"), py::arg("key"),
        py::arg("codes"), py::arg("amax"), py::arg("k16"), py::arg("threads"));
  m.def("dequantize_group", &dequantize_group, "codes, amax, k16 -> out.", py::arg("codes"), py::arg("amax"), py::arg("k16"),
        py::arg("numel"), py::arg("codec"), py::arg("group_size"), py::arg("out"), py::arg("out_dtype"), py::arg("threads"));
  m.def("quantize_blockwise", &quantize_blockwise, "x -> codes, absmax [n_blocks].", py::arg("x"), py::arg("x_dtype"), py::arg("numel"),
        py::arg("block_size"), py::arg("is_signed"), py::arg("codes"), py::arg("absmax"), py::arg("threads"));
  m.def("dequantize_blockwise", &dequantize_blockwise, "codes, absmax -> out.", py::arg("codes"), py::arg("absmax"), py::arg("numel"),
        py::arg("block_size"), py::arg("is_signed"), py::arg("out"), py::arg("out_dtype"), py::arg("threads"));
  m.def("dynamic8_tables", &dynamic8_tables, "The map's 256 values and the encode table, as lists.", py::arg("is_signed"));
  m.def("step_8bit", &step_8bit, "One blockwise 8-bit step of every row of an int64 [n_tensors, 10] table, in place.", py::arg("table"),
        py::arg("n_tensors"), py::arg("param_dtype"), py::arg("grad_dtype"), py::arg("rule"), py::arg("quantized"), py::arg("block_size"),
        py::arg("param_rounding"), py::arg("seed"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("maximize"), py::arg("nesterov"), py::arg("grad_scale"), py::arg("threads"));
  m.def("adamw_fp8", &adamw_fp8, "One AdamW step of every row of an int64 [n_tensors, 10] table, in place.", py::arg("table"),
        py::arg("n_tensors"), py::arg("param_dtype"), py::arg("grad_dtype"), py::arg("exp_avg_codec"), py::arg("exp_avg_sq_codec"),
        py::arg("group_size"), py::arg("stochastic_exp_avg"), py::arg("stochastic_exp_avg_sq"), py::arg("param_rounding"), py::arg("seed"),
        py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("maximize"),
        py::arg("grad_scale"), py::arg("threads"));
  bind_came(m);
  bind_activation_quant(m);
  bind_tensor_quant(m);
  bind_norm(m);
  bind_activation(m);
}
