"""Quantize and dequantize in groups of a row in the interpreter: bit for bit the PyTorch reference's."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.scaled8 import ROW_GROUP_SIZES, SCALED_FORMATS, decode, encode
from coat_kernels.formats.triton_ptx import PTX, PTX_FP8
from coat_kernels.ops.activation_quant import triton as kernel

ON_PTX = os.environ.get("COAT_TEST_ISA") == "ptx"
every_format = pytest.mark.parametrize("fmt", SCALED_FORMATS)


@pytest.fixture(params=[PTX.value, PTX_FP8.value] if ON_PTX else [None], ids=lambda isa: {1: "sm_75", 2: "sm_89"}.get(isa))
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The assembly of GPUs with and without FP8 conversions."""
    if ON_PTX:
        monkeypatch.setattr(kernel, "instruction_set", lambda _: request.param)


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def check(x: Tensor, fmt: str, group_size: int, dtype: torch.dtype = torch.float32) -> None:
    want, want_scale = encode(x, fmt, group_size)
    codes, scale = kernel.quantize_activation(x, fmt, group_size, want_scale.shape)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes, want)
    assert same(kernel.dequantize_activation(codes, scale, fmt, group_size, dtype), decode(want, want_scale, fmt, group_size, dtype))


def samples(*shape: int, width: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(width * torch.randn(shape, generator=generator))


@every_format
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("group_size", [16, 256])
def test_every_bfloat16(fmt: str, group_size: int) -> None:
    patterns = torch.arange(65536)
    shuffled = patterns[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    for order in (patterns, shuffled):
        check(torch.where(order >= 32768, order - 65536, order).to(torch.int16).view(torch.bfloat16).view(64, 1024), fmt, group_size)


@every_format
@pytest.mark.usefixtures("gpu")
def test_every_code(fmt: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    scale = torch.tensor([[0.37], [2.0**-110], [1e30], [-0.37 if fmt == "auto" else 1.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same(kernel.dequantize_activation(codes, scale, fmt, 256, dtype), decode(codes, scale, fmt, 256, dtype))


@every_format
@pytest.mark.parametrize("group_size", ROW_GROUP_SIZES)
def test_rows_with_every_kind_of_tail(fmt: str, group_size: int) -> None:
    for row in (1, group_size - 1, group_size, 3 * group_size + 5):
        check(samples(2, row), fmt, group_size, torch.bfloat16)
    check(torch.zeros(0, 2 * group_size), fmt, group_size)
    check(torch.zeros(3, 0), fmt, group_size)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_widths_and_dtypes(fmt: str, dtype: torch.dtype) -> None:
    for width in (0.0, 1.0, 3.0):
        check(samples(20, 384, width=width).to(dtype), fmt, 128, dtype)


@every_format
@pytest.mark.parametrize("odd", [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-44, 3.4e38, -1e-30])
def test_one_odd_value_at_every_position(fmt: str, odd: float) -> None:
    for others in (samples(16).repeat(16, 1), torch.zeros(16, 16), torch.full((16, 16), odd)):
        check(others.fill_diagonal_(odd), fmt, 16)
