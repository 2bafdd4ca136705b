"""The rank penalty's projector against a singular value decomposition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from coat_kernels.ops.came_8bit.settings import RANK_HEAD, tail_side
from coat_kernels.ops.came_8bit.tail import refresh_tails


def directions(w: torch.Tensor) -> torch.Tensor:
    """U_tail V_tailᵀ by `refresh_tails`."""
    flat = w.view(w.shape[0], -1)
    tail = torch.full((tail_side(w.shape),) * 2, math.nan, device=w.device)
    refresh_tails([w], [tail])
    flat = flat.float()
    return tail @ flat if flat.shape[0] <= flat.shape[1] else flat @ tail


@pytest.mark.parametrize("shape", [(16, 3072), (3072, 16), (11, 11), (128, 200), (20, 3, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tail_is_that_of_the_decomposition(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    u, _, v = torch.linalg.svd(w.double().view(shape[0], -1), full_matrices=False)
    want = u[:, RANK_HEAD:] @ v[RANK_HEAD:]
    # float32 sums: 1e-7 of the strongest singular value's square, against gaps of its hundredth between neighbours
    assert torch.allclose(directions(w).double(), want, atol=1e-3 * float(want.abs().max()))


def test_strong_directions_stay_out_of_the_tail() -> None:
    """Ten directions a hundred times stronger than the rest: nothing of them is added to the gradient."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 16, generator=generator, dtype=torch.float64))[0] for n in (16, 500))
    values = torch.tensor([100.0] * 10 + [1.0, 0.8, 0.6, 0.4, 0.3, 0.2], dtype=torch.float64)
    got = directions((left * values @ right.T).float()).double()
    inside = left.T @ got @ right
    assert inside[:10, :10].abs().max() < 1e-2
    assert torch.allclose(inside[10:, 10:], torch.eye(6, dtype=torch.float64), atol=0.05)


def test_rank_ten_and_directions_without_information_have_no_tail() -> None:
    generator = torch.Generator().manual_seed(2)
    low_rank = torch.randn(16, 10, generator=generator) @ torch.randn(10, 300, generator=generator)
    for w in (low_rank, torch.zeros(16, 300), torch.full((16, 300), math.nan), torch.full((16, 300), math.inf)):
        tail = torch.full((16, 16), math.nan)
        refresh_tails([w], [tail])
        assert not tail.any()


def test_many_matrices_of_several_shapes_and_none() -> None:
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(shape, generator=generator) for shape in ((12, 40), (40, 12), (12, 40), (30, 31))]
    tails = [torch.empty((tail_side(p.shape),) * 2) for p in params]
    refresh_tails(params, tails)
    for param, tail in zip(params, tails, strict=True):
        alone = torch.empty_like(tail)
        refresh_tails([param], [alone])
        assert torch.allclose(tail, alone, rtol=1e-5, atol=1e-6)
    refresh_tails([], [])
