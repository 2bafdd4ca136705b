"""Two-stage group scaling in the interpreter: bit for bit the PyTorch reference's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.scaled8 import SINGLE_FORMATS, group_amax, scale_of
from coat_kernels.ops.tensor_quant import reference
from coat_kernels.ops.tensor_quant import triton as kernel


def samples(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))
    x.view(-1)[::37] = torch.nan
    x.view(-1)[1::53] = -torch.inf
    x.view(-1)[2::11] = -0.0
    return x


@pytest.mark.parametrize("fmt", SINGLE_FORMATS)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("shape", "group_size"), [((7, 301), 16), ((2, 3, 512), 128), ((9, 512), 32), ((1,), 16), ((40_000,), 256), ((0, 4), 16)]
)
def test_there_and_back(fmt: str, per_row: bool, shape: tuple[int, ...], group_size: int) -> None:
    scale_shape = torch.Size((*shape[:-1], 1)) if per_row else torch.Size(())
    for dtype, share in ((torch.float32, 1.0), (torch.bfloat16, 0.5)):  # of the maxima: magnitudes above them saturate
        x = samples(*shape).to(dtype)
        want_amax = group_amax(x, group_size)
        amax = kernel.group_amax(x, group_size, want_amax.shape)
        assert torch.equal(amax, want_amax)
        want, want_scale = reference.quantize_with_amax(x, share * amax, fmt=fmt, scale_shape=scale_shape)
        codes, scale = kernel.quantize_with_amax(x, share * amax, fmt, scale_shape)
        assert torch.equal(scale, want_scale)
        assert torch.equal(codes, want)
        back = kernel.dequantize_tensor(codes, scale, fmt, dtype)
        values = reference.dequantize_tensor(want, want_scale, fmt=fmt, dtype=dtype)
        assert torch.equal(back.isnan(), values.isnan()) and torch.equal(back.nan_to_num(), values.nan_to_num())


@pytest.mark.parametrize("per_row", [False, True])
def test_the_largest_is_found_wherever_it_lies(per_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """188 maxima in chunks of 4 for stage two, of 32 for the two programs before it."""
    monkeypatch.setattr(kernel, "_PARTIALS", 2)
    monkeypatch.setattr(kernel, "_CHUNK", 4)
    x = torch.ones(1, 3000)
    for group in (0, 3, 4, 31, 32, 63, 64, 128, 187):
        amax = group_amax(x, 16)
        amax[0, group] = 7.0
        _, scale = kernel.quantize_with_amax(x, amax, "e4m3", torch.Size((1, 1)) if per_row else torch.Size(()))
        assert scale.item() == scale_of(torch.tensor(7.0), "e4m3")


@pytest.mark.parametrize("shape", [(1, 1), (63, 65), (64, 128), (130, 3), (0, 2)])
def test_transpose(shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernel.transpose_codes(codes), codes.t().contiguous())
