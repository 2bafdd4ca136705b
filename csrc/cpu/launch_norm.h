// The entry points of norms, of norms with rotary embedding and of gated residuals. Gradients of factors are null where not needed.
#pragma once

#include "gated_residual.h"
#include "norm.h"
#include "norm_rope.h"

namespace coat {

void norm(const NormJob& job, int threads);
void norm_from_codes(const NormFromCodesJob& job, int threads);
void norm_backward(const NormBackwardJob& job, int64_t segments, float* dgain, float* dshift, int threads);
void norm_rope(const NormRopeJob& job, int threads);
void norm_rope_backward(const NormRopeBackwardJob& job, float* dweight, float* dfirst_weight, int threads);
void gated_residual(const GatedResidualJob& job, int threads);
void gated_residual_backward(const GatedResidualBackwardJob& job, float* dgate, int threads);

}  // namespace coat
