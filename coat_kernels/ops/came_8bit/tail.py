"""The rank penalty's state: for a matrix W = Σ s_k u_k v_kᵀ, the projector P = Σ_{k > 10} u_k u_kᵀ / s_k on its shorter side.

P W (or W P) is U_tail V_tailᵀ, the gradient of the tail's nuclear norm, without a singular value decomposition of W: P comes from the
eigenvectors of W's Gram matrix, and W turns so slowly that it serves for `TAIL_INTERVAL` steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .settings import RANK_HEAD, matrix_sides

#: Directions weaker than this share of the strongest one have no tail: float32 sums leave 1e-7 of its square as noise in the Gram matrix.
#: Sums in float64 would reach 1e-6 and take twice as long: 52 ms for 400 factors of 16 by 3072, against 26.
_SMALLEST = 1e-3


def refresh_tails(params: Sequence[Tensor], tails: Sequence[Tensor]) -> None:
    """Write each parameter's P into its tail, in place.

    Args:
        params: contiguous matrices whose shorter side is n, 10 < n <= 128; more dimensions are flattened behind the first.
        tails: float32 [n, n].
    """
    batches: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for i, param in enumerate(params):
        batches[param.shape, param.dtype, param.device].append(i)
    for (shape, _, _), members in batches.items():
        rows, cols = matrix_sides(shape) or (0, 0)
        grams = torch.stack([_gram(params[i].view(rows, cols)) for i in members])
        torch._foreach_copy_([tails[i] for i in members], list(_projectors(grams).to(torch.float32).unbind()))


def _gram(w: Tensor) -> Tensor:
    """float64 [n, n] on the shorter side, summed in float32."""
    wide = (w if w.shape[0] <= w.shape[1] else w.t()).to(torch.float32)
    return (wide @ wide.t()).to(torch.float64)


def _projectors(grams: Tensor) -> Tensor:
    """float64 [batch, n, n] from Gram matrices; a matrix that is not finite has none."""
    finite = grams.isfinite().all(-1).all(-1)[:, None, None]
    squares, vectors = torch.linalg.eigh(torch.where(finite, grams, 0))
    values = squares.clamp_min(0).sqrt()
    kept = values > _SMALLEST * values[:, -1:]
    kept[:, -RANK_HEAD:] = False
    inverse = torch.where(kept, 1 / values, 0)
    return (vectors * inverse[:, None, :]) @ vectors.transpose(1, 2)
