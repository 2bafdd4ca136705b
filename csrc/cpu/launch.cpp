#include "launch.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <cmath>
#include <exception>
#include <stdexcept>
#include <thread>

#include "../formats/random.h"
#include "parallel.h"

namespace coat {
namespace {

constexpr int64_t kElementsPerThread = 1 << 16;  // below this a thread costs more than it saves

const std::vector<Kernels>& supported() {
  static const std::vector<Kernels> found = [] {
    std::vector<Kernels> kernels;
#ifdef COAT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      kernels.push_back(avx512::kKernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      kernels.push_back(avx2::kKernels);
    }
#endif
    kernels.push_back(generic::kKernels);
    return kernels;
  }();
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{&supported().front()};
  return kernels;
}

StepRow make_row(const int64_t* entry, const StepFormat& format, const Hyperparameters& hyper) {
  StepRow row{};
  const uint32_t t = open_row(entry, hyper, &row);
  row.amax = pointer<float>(entry[4]);
  row.k16 = pointer<uint8_t>(entry[5]);
  for (uint32_t stream = 0; stream < 3; ++stream) {
    row.keys[stream] = stream_key(format.seed, t, static_cast<uint32_t>(entry[9]), stream);
  }
  return row;
}

}  // namespace

const Kernels& kernels_in_use() { return *chosen().load(); }

// Threads are made for the call: a pool would not survive a fork, and OpenMP would bring a second runtime beside torch's.
void parallel(int64_t units, int64_t elements, int threads, const std::function<void(int64_t, int64_t)>& work) {
  const int64_t useful = std::min<int64_t>({threads, units, elements / kElementsPerThread});
  const int64_t parts = std::max<int64_t>(useful, 1);
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(parts));
  int64_t begin = 0;
  for (int64_t part = 0; part + 1 < parts; ++part) {
    const int64_t end = units * (part + 1) / parts;
    try {
      others.emplace_back(std::cref(work), begin, end);
    } catch (const std::exception&) {
      break;  // no thread, or no memory for one: the rest is done here
    }
    begin = end;
  }
  struct Join {  // whatever this thread's share throws
    std::vector<std::thread>& threads;
    ~Join() {
      for (std::thread& thread : threads) thread.join();
    }
  } join{others};
  work(begin, units);
}

void expect_whole_write(void* output, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kFresh = 32 << 20, kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(output), first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  // a hint: where it is refused the pages are small
  if (static_cast<uintptr_t>(bytes) >= kFresh) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(output);
  static_cast<void>(bytes);
#endif
}

std::string isa() { return chosen().load()->name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels& kernels : supported()) names.emplace_back(kernels.name);
  return names;
}

void use_isa(const std::string& name) {
  std::string choices;
  for (const Kernels& kernels : supported()) {
    if (name == kernels.name) {
      chosen() = &kernels;
      return;
    }
    choices += (choices.empty() ? "" : ", ") + std::string(kernels.name);
  }
  throw std::invalid_argument("no kernels for instruction set '" + name + "' on this processor; choose one of " + choices);
}

GroupFormat make_format(Codec codec, int group_size, bool has_signs, bool keep_nonzero, bool stochastic) {
  GroupFormat format{};
  format.codec = codec;
  format.quantized = is_quantized(codec);
  format.packed = is_e2m1(codec);
  format.has_signs = has_signs;
  format.keep_nonzero = keep_nonzero;
  format.stochastic = stochastic;
  format.group_size = group_size;
  format.expand = codec_spec(codec).expand;
  format.range_q15 = codec_spec(codec).range_q15;
  format.max_code = codec_spec(codec).max_code;
  format.low_mask = codec == Codec::kLog8 ? kLog8LowMask : kFp8LowMask;
  if (format.quantized) format.decode = decode_tables(codec);
  format.nan_code = is_fp8(codec) ? kNanCode : 0;
  if (is_small_float(codec)) format.buckets = &bucket_table(codec);
  if (codec == Codec::kLog8) format.dither = dither_tables();
  return format;
}

void quantize_group(const QuantizeJob& job, int threads) {
  const Kernels& kernels = kernels_in_use();
  const int64_t groups = num_groups(job.numel, job.format.group_size);
  parallel(groups, job.numel, threads, [&](int64_t begin, int64_t end) { kernels.quantize(job, begin, end); });
}

void dequantize_group(const DequantizeJob& job, int threads) {
  const Kernels& kernels = kernels_in_use();
  const int64_t groups = num_groups(job.numel, job.format.group_size);
  parallel(groups, job.numel, threads, [&](int64_t begin, int64_t end) { kernels.dequantize(job, begin, end); });
}

void adamw_fp8(const int64_t* table, int64_t n_tensors, const StepFormat& format, const Hyperparameters& hyper, int threads) {
  const Kernels& kernels = kernels_in_use();
  StepJob job{};
  job.exp_avg = make_format(format.exp_avg, format.group_size, true, codec_spec(format.exp_avg).expand, format.stochastic_exp_avg);
  job.exp_avg_sq = make_format(format.exp_avg_sq, format.group_size, false, true, format.stochastic_exp_avg_sq);
  job.param_dtype = format.param_dtype;
  job.grad_dtype = format.grad_dtype;
  job.param_rounding = format.param_rounding;
  job.beta1 = static_cast<float>(hyper.beta1);
  job.beta2 = static_cast<float>(hyper.beta2);
  job.eps = static_cast<float>(hyper.eps);
  job.decay = static_cast<float>(1 - hyper.lr * hyper.weight_decay);
  job.grad_to_exp_avg = static_cast<float>((hyper.maximize ? -1 : 1) * (1 - hyper.beta1) / hyper.grad_scale);
  job.grad_to_root_sq = static_cast<float>(std::sqrt(1 - hyper.beta2) / hyper.grad_scale);
  job.inv_grad_scale = static_cast<float>(1 / hyper.grad_scale);

  std::vector<StepRow> rows;
  rows.reserve(static_cast<size_t>(n_tensors));
  for (int64_t i = 0; i < n_tensors; ++i) rows.push_back(make_row(table + 10 * i, format, hyper));
  parallel_rows(rows, format.group_size, threads, [&](const StepRow& row, int64_t from, int64_t to) { kernels.step(job, row, from, to); });
}

}  // namespace coat
