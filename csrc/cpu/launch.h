// The entry points that the Python module binds: addresses in, work split over threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace coat {

// The instruction set in use, those this processor has, and the choice of one (std::invalid_argument for others).
std::string isa();
std::vector<std::string> isas();
void use_isa(const std::string& name);

struct Hyperparameters {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  double grad_scale;
};

struct StepFormat {
  DType param_dtype, grad_dtype;
  Codec exp_avg, exp_avg_sq;
  int group_size;
  bool stochastic_exp_avg, stochastic_exp_avg_sq;
  ParamRounding param_rounding;
  uint32_t seed;
};

void quantize_group(const QuantizeJob& job, int threads);
void dequantize_group(const DequantizeJob& job, int threads);
// table: int64 [n_tensors, 10], the columns of ops/pointer_table.py. Counts every tensor's step up.
void adamw_fp8(const int64_t* table, int64_t n_tensors, const StepFormat& format, const Hyperparameters& hyper, int threads);

}  // namespace coat
