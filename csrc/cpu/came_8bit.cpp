// The fused CAME step: arXiv 2307.02047, and Automagic_CameAMP_Improved_8Bit. Formulas: ops/came_8bit/reference.py. Compiled once for
// each instruction set.
//
// A tensor's sums over rows, columns and the whole are needed one after the other, so it is walked in passes, by one thread; its
// gradient and momentum lie in float32 workspaces meanwhile, which for a LoRA factor stay in L2.
#include "kernels.h"

#include "came_update.h"

namespace coat::COAT_ISA {

void came_8bit(const CameJob& job, const CameRow& row, float* memory) {
  if (row.numel == 0) return;
  Work w = make_work(job, row, memory);
  const bool early = job.phase == CamePhase::kEarly, signs = job.amp && job.phase != CamePhase::kLate;
  shape_gradient(w);
  sum_gradient(w);
  for (int64_t i = 0; i < w.rows; ++i) w.row_keep[i] = 1.0f;
  if (job.amp && !early && job.background_regularization && w.matrix) find_background(w);
  advance_factors(w, row.exp_avg_sq_row, row.exp_avg_sq_col, w.col_sq, job.beta2, row.bias_correction2, job.eps1);

  load_momentum(w);
  double squares;
  if (row.torque != nullptr) {
    squares = row.row_variance != nullptr ? sum_normalised<true, true>(w) : sum_normalised<true, false>(w);
  } else {
    squares = row.row_variance != nullptr ? sum_normalised<false, true>(w) : sum_normalised<false, false>(w);
  }
  const float clip = clip_factor(w, squares);
  if (signs) find_bumps(w, clip);
  if (row.torque != nullptr) {
    prepare_torque(w, clip);
    job.use_8bit ? advance_momentum<Torque::kCodes>(w, clip) : advance_momentum<Torque::kFloats>(w, clip);
  } else {
    advance_momentum<Torque::kNone>(w, clip);
  }
  store_momentum(w);
  if (job.came && (job.amp || w.matrix)) {
    advance_factors(w, row.res_row, row.res_col, w.col_sum, job.beta3, row.bias_correction3, job.eps2);
  } else {
    for (int64_t i = 0; i < w.rows; ++i) w.row_factor[i] = 1.0f;
    for (int64_t j = 0; j < w.stride; ++j) w.col_factor[j] = 1.0f;
  }
  find_row_scales(w);
  if (!job.amp) {
    apply_update<false, false>(w, {1.0f, 0.0f});
  } else if (early) {
    apply_update<true, true>(w, measure_update<true>(w));
  } else {
    apply_update<true, false>(w, measure_update<false>(w));
  }
}

}  // namespace coat::COAT_ISA
