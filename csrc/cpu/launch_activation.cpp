// Entry point of the activation functions.
#include "parallel.h"

namespace coat {
namespace {

bool in_one_piece(const ActivationJob& job, const ActivationOperand& operand) {
  return operand.values == nullptr || operand.stride == job.width;
}

// Rows whose groups do not straddle them are one long row: pieces of work then do not end with a short row.
void flatten(ActivationJob* job) {
  const bool grouped = job->gate.codes != nullptr || job->out_amax != nullptr;
  const bool halves = job->dy != nullptr && job->gated();  // out has a row of its own for each row
  if (halves || (grouped && job->width % job->format.group_size != 0) || !in_one_piece(*job, job->gate) || !in_one_piece(*job, job->up))
    return;
  job->width *= job->rows;
  job->rows = 1;
  job->gate.stride = job->up.stride = job->width;
}

}  // namespace

void activation(ActivationJob job, int threads) {
  const Kernels& kernels = kernels_in_use();
  flatten(&job);
  const int64_t pieces = job.rows * num_groups(job.width, kBlock);
  parallel(pieces, job.rows * job.width, threads, [&](int64_t begin, int64_t end) { kernels.activation(job, begin, end); });
}

}  // namespace coat
