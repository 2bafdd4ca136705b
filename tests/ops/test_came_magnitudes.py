"""Sum of gradient magnitudes: every dtype against float64, chunks, odd layouts, threads."""

from __future__ import annotations

import math

import pytest
import torch

from coat_kernels.ops.came_8bit.magnitudes import grad_l1, sum_magnitudes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_over_tensors_of_every_size(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (0, 1, 31, 33, 16384, 16385, 100_003)
    tensors = [torch.randn(n, generator=generator).mul(10.0 ** (i - 3)).to(device, dtype) for i, n in enumerate(sizes)]
    want = sum(float(t.double().abs().sum()) for t in tensors)
    # 512 additions in float32 for each partial sum: 512 · 2^-24 at most, a hundredth of it as a rule
    assert sum_magnitudes(tensors) == pytest.approx(want, rel=3e-5)
    for tensor in tensors:
        assert sum_magnitudes([tensor]) == pytest.approx(float(tensor.double().abs().sum()), rel=3e-5)


def test_dtypes_may_mix_and_layouts_be_odd() -> None:
    odd = torch.randn(40, 50).t()[::2]
    mixed = [odd, torch.ones(3, dtype=torch.bfloat16), torch.full((2,), -2.0, dtype=torch.float16)]
    assert sum_magnitudes(mixed) == pytest.approx(float(odd.abs().sum()) + 7, rel=1e-5)
    assert sum_magnitudes([]) == 0


def test_what_is_not_finite_shows() -> None:
    x = torch.ones(100)
    x[40] = -math.inf
    assert sum_magnitudes([x]) == math.inf
    x[50] = math.nan
    assert math.isnan(sum_magnitudes([x]))


def test_the_sum_does_not_depend_on_threads() -> None:
    tensors = [torch.randn(50_000) for _ in range(5)]
    before = torch.get_num_threads()
    try:
        sums = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.add(sum_magnitudes(tensors))
    finally:
        torch.set_num_threads(before)
    assert len(sums) == 1


def test_agr_is_off_without_a_finite_sum(device: torch.device) -> None:
    x = torch.tensor([3.0, -5.0], device=device)
    scale = torch.tensor(4.0, device=device)
    assert float(grad_l1([x, x], None)) == 16
    assert float(grad_l1([x, x], scale)) == 4
    assert isinstance(grad_l1([x], None), torch.Tensor) == (device.type == "cuda"), "a GPU's sum stays there"
    for value in (0.0, math.inf, math.nan):
        assert float(grad_l1([torch.full((3,), value, device=device)], None)) == math.inf
    assert grad_l1([], None) == math.inf
