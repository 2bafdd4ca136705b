// Entry points of the blockwise ops: tables, a step's constants, work split over threads.
#include <cmath>

#include "../formats/random.h"
#include "blockwise.h"
#include "parallel.h"

namespace coat {
namespace {

Step8bitRow make_row(const int64_t* entry, const Step8bitFormat& format, const Step8bitHyperparameters& hyper) {
  Step8bitRow row{};
  const uint32_t t = open_row(entry, hyper, &row);
  row.exp_avg_absmax = pointer<float>(entry[4]);
  row.exp_avg_sq_absmax = pointer<float>(entry[5]);
  row.param_key = stream_key(format.seed, t, static_cast<uint32_t>(entry[9]), kStreamParam);
  return row;
}

Step8bitJob make_job(const Step8bitFormat& format, const Step8bitHyperparameters& hyper) {
  Step8bitJob job{};
  job.rule = format.rule;
  job.quantized = format.quantized;
  job.block_size = format.block_size;
  job.param_dtype = format.param_dtype;
  job.grad_dtype = format.grad_dtype;
  job.param_rounding = format.param_rounding;
  job.nesterov = hyper.nesterov;
  job.signed_map = &dynamic8_tables(true);
  job.unsigned_map = &dynamic8_tables(false);
  const double sign = (hyper.maximize ? -1 : 1) / hyper.grad_scale;
  const bool momentum = format.rule == Rule::kMomentum, adamw = format.rule == Rule::kAdamW;
  job.beta1 = static_cast<float>(hyper.beta1);
  job.beta2 = static_cast<float>(hyper.beta2);
  job.eps = static_cast<float>(hyper.eps);
  job.lr = static_cast<float>(hyper.lr);
  job.decay = static_cast<float>(1 - hyper.lr * hyper.weight_decay);
  job.grad_to_first = static_cast<float>(momentum ? sign : sign * (1 - hyper.beta1));
  job.grad_to_second = static_cast<float>(adamw ? std::sqrt(1 - hyper.beta2) / hyper.grad_scale : sign * (1 - hyper.beta2));
  job.inv_grad_scale = static_cast<float>(1 / hyper.grad_scale);
  return job;
}

}  // namespace

const Dynamic8Tables& dynamic8_tables(bool is_signed) {
  alignas(64) static constexpr Dynamic8Tables signed_map = make_dynamic8_tables(true), unsigned_map = make_dynamic8_tables(false);
  return is_signed ? signed_map : unsigned_map;
}

void quantize_blockwise(const QuantizeBlockwiseJob& job, int threads) {
  const Kernels& kernels = kernels_in_use();
  const int64_t blocks = num_groups(job.numel, job.block_size);
  parallel(blocks, job.numel, threads, [&](int64_t begin, int64_t end) { kernels.quantize_blockwise(job, begin, end); });
}

void dequantize_blockwise(const DequantizeBlockwiseJob& job, int threads) {
  const Kernels& kernels = kernels_in_use();
  const int64_t blocks = num_groups(job.numel, job.block_size);
  parallel(blocks, job.numel, threads, [&](int64_t begin, int64_t end) { kernels.dequantize_blockwise(job, begin, end); });
}

void step_8bit(const int64_t* table, int64_t n_tensors, const Step8bitFormat& format, const Step8bitHyperparameters& hyper, int threads) {
  const Kernels& kernels = kernels_in_use();
  const Step8bitJob job = make_job(format, hyper);
  std::vector<Step8bitRow> rows;
  rows.reserve(static_cast<size_t>(n_tensors));
  for (int64_t i = 0; i < n_tensors; ++i) rows.push_back(make_row(table + 10 * i, format, hyper));
  parallel_rows(rows, format.block_size, threads,
                [&](const Step8bitRow& row, int64_t from, int64_t to) { kernels.step_8bit(job, row, from, to); });
}

}  // namespace coat
