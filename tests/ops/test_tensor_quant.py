"""The ops of two-stage group scaling: every backend against the reference, schemas, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import coat_kernels
from coat_kernels.formats import scaled8
from coat_kernels.formats.scaled8 import MIN_AMAX, SINGLE_FORMATS
from coat_kernels.ops.tensor_quant import reference

OPS = torch.ops.coat_kernels
every_format = pytest.mark.parametrize("fmt", SINGLE_FORMATS)
every_kind = pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "rows"])


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))).to(dtype)


def want(x: Tensor, fmt: str, group_size: int, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    amax = scaled8.group_amax(x.cpu(), group_size)
    shape = torch.Size((*x.shape[:-1], 1)) if per_row else torch.Size(())
    return (*reference.quantize_with_amax(x.cpu(), amax, fmt=fmt, scale_shape=shape), amax)


def same(got: Tensor, expected: Tensor) -> bool:
    got = got.cpu()
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())


def check(x: Tensor, fmt: str, group_size: int, per_row: bool) -> None:
    """Bit for bit, there and back."""
    expected = want(x, fmt, group_size, per_row)
    got = OPS.quantize_tensor(x, fmt, group_size, per_row)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    for mine, theirs in zip(OPS.quantize_with_amax(x, got[2], fmt, per_row), expected[:2], strict=True):
        assert torch.equal(mine.cpu(), theirs)
    for dtype in (torch.float32, torch.bfloat16):
        back = OPS.dequantize_tensor(got[0], got[1], fmt, dtype)
        assert back.dtype == dtype
        assert same(back, reference.dequantize_tensor(expected[0], expected[1], fmt=fmt, dtype=dtype))


@every_format
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_the_reference(fmt: str, per_row: bool, dtype: torch.dtype, machine: torch.device) -> None:
    for shape, group_size in (((37, 1001), 128), ((5, 7, 256), 64), ((3, 4096), 16), ((70_000,), 256), ((300, 3), 32)):
        check(sample(*shape, dtype=dtype).to(machine), fmt, group_size, per_row)


@every_format
@every_kind
def test_every_bfloat16(fmt: str, per_row: bool, machine: torch.device) -> None:
    patterns = torch.arange(65536)
    x = torch.where(patterns >= 32768, patterns - 65536, patterns).to(torch.int16).view(torch.bfloat16)
    check(x.view(64, 1024).to(machine), fmt, 128, per_row)
    check(x[torch.randperm(65536, generator=torch.Generator().manual_seed(0))].view(16, 4096).to(machine), fmt, 128, per_row)


@every_format
@every_kind
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), -0.0, 1e-44])
def test_one_odd_value(fmt: str, per_row: bool, odd: float, machine: torch.device) -> None:
    for position in (0, 63, 64, 130):
        x = sample(2, 131)
        x[1, position] = odd
        check(x.to(machine), fmt, 64, per_row)
    check(torch.full((2, 131), odd, device=machine), fmt, 64, per_row)


@every_format
@every_kind
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (1,), (1, 1), (2, 65)])
def test_shapes(fmt: str, per_row: bool, shape: tuple[int, ...], machine: torch.device) -> None:
    check(sample(*shape).to(machine), fmt, 64, per_row)


@every_format
def test_zeros_have_the_smallest_scale(fmt: str, machine: torch.device) -> None:
    codes, scale, amax = OPS.quantize_tensor(torch.zeros(4, 100, device=machine), fmt, 32, False)
    assert not codes.any() and not amax.any()
    assert scale.item() == torch.tensor(MIN_AMAX) / scaled8.MAX[fmt]


@every_format
@every_kind
def test_magnitudes_above_a_producers_maxima_saturate(fmt: str, per_row: bool, machine: torch.device) -> None:
    x = sample(8, 300)
    x[2, 5], x[3, 299] = float("nan"), 1e30
    amax = torch.full((8, 3), 0.5)
    shape = torch.Size((8, 1)) if per_row else torch.Size(())
    expected = reference.quantize_with_amax(x, amax, fmt=fmt, scale_shape=shape)
    got = OPS.quantize_with_amax(x.to(machine), amax.to(machine), fmt, per_row)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)
    back = OPS.dequantize_tensor(*got, fmt, torch.float32)
    assert back[2, 5].isnan() and back[3, 299] == 0.5


def test_one_scale_is_that_of_the_largest_group(machine: torch.device) -> None:
    x = sample(6, 512).to(machine)
    _, scale, amax = OPS.quantize_tensor(x, "e4m3", 128, False)
    assert amax.shape == (6, 4)
    assert torch.equal(amax.max(), x.abs().max())
    assert torch.equal(scale, x.abs().max() / torch.full_like(scale, scaled8.MAX["e4m3"]))
    _, rows, _ = OPS.quantize_tensor(x, "e4m3", 128, True)
    assert torch.equal(rows, x.abs().amax(-1, keepdim=True) / torch.full_like(rows, scaled8.MAX["e4m3"]))


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 9), (8, 8), (64, 64), (65, 200), (130, 63), (256, 1000)])
def test_transpose(shape: tuple[int, int], machine: torch.device) -> None:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(machine)
    assert torch.equal(OPS.transpose_codes(codes), codes.t().contiguous())


@every_format
@every_kind
def test_opcheck(fmt: str, per_row: bool, device: torch.device) -> None:
    x = sample(3, 200).to(device)
    torch.library.opcheck(OPS.quantize_tensor.default, (x, fmt, 64, per_row))
    codes, scale, amax = OPS.quantize_tensor(x, fmt, 64, per_row)
    torch.library.opcheck(OPS.quantize_with_amax.default, (x, amax, fmt, per_row))
    torch.library.opcheck(OPS.dequantize_tensor.default, (codes, scale, fmt, torch.bfloat16))
    torch.library.opcheck(OPS.transpose_codes.default, (codes,))


@every_format
@every_kind
def test_float64_is_computed_in_float64(fmt: str, per_row: bool) -> None:
    x = sample(9, 100).double()
    codes, scale, amax = OPS.quantize_tensor(x, fmt, 32, per_row)
    assert scale.dtype == amax.dtype == torch.float64
    torch.library.opcheck(OPS.quantize_tensor.default, (x, fmt, 64, per_row))
    back = OPS.dequantize_tensor(codes, scale, fmt, torch.float64)
    assert back.dtype == torch.float64 and (back - x).norm() < 0.1 * x.norm()


@every_format
@every_kind
def test_public_wrapper(fmt: str, per_row: bool, device: torch.device) -> None:
    x = sample(10, 300).to(device)
    q = coat_kernels.quantize_tensor(x, fmt, 64, per_row=per_row)
    assert q.nbytes == x.numel() + 4 * (10 if per_row else 1)
    if fmt == "int8":
        with pytest.raises(ValueError, match="int8 codes are no float8"):
            _ = q.float8
    else:
        assert torch.equal(q.float8.to(torch.float32) * q.scale, coat_kernels.dequantize_tensor(q))
    compiled = torch.compile(
        lambda t: coat_kernels.dequantize_tensor(coat_kernels.quantize_tensor(t, fmt, per_row=per_row)), backend="eager"
    )
    assert torch.equal(compiled(x), coat_kernels.dequantize_tensor(q))


def test_non_contiguous_input(device: torch.device) -> None:
    x = sample(48, 100).to(device)
    for got, expected in zip(
        OPS.quantize_tensor(x.t(), "e4m3", 16, True), OPS.quantize_tensor(x.t().contiguous(), "e4m3", 16, True), strict=True
    ):
        assert torch.equal(got, expected)
    codes = torch.arange(40, dtype=torch.uint8, device=device).view(5, 8)[:, ::2]
    assert torch.equal(OPS.transpose_codes(codes), codes.t())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: coat_kernels.quantize_tensor(x, "auto"), ValueError, "'auto' cannot go with one scale .* known formats: e4m3, e5m2"),
        (lambda x: coat_kernels.quantize_tensor(x, group_size=8), ValueError, "group size 8 is not offered"),
        (lambda x: coat_kernels.quantize_tensor(x.long()), TypeError, "x has dtype torch.int64; pass float32"),
        (lambda x: coat_kernels.quantize_tensor(x[0, 0]), ValueError, r"shape \(\) has none; pass x.view\(1\)"),
        (lambda x: OPS.quantize_with_amax(x, x[:1], "e4m3", False), ValueError, r"needs maxima of shape \(4, 'groups'\), got \(1, 64\)"),
        (lambda x: OPS.quantize_with_amax(x, x.double(), "e4m3", False), TypeError, "group_amax must be torch.float32"),
        (lambda x: OPS.dequantize_tensor(x, x, "e4m3", torch.float32), TypeError, "codes must be torch.uint8"),
        (lambda x: OPS.dequantize_tensor(x.byte(), x, "e4m3", torch.float32), ValueError, r"of shape \(\) or \(4, 1\), got \(4, 64\)"),
        (lambda x: OPS.dequantize_tensor(x.byte(), x[0, 0], "e4m3", torch.int8), TypeError, "the result has dtype torch.int8"),
        (lambda x: OPS.transpose_codes(x), ValueError, "a matrix of one-byte codes is needed"),
    ],
)  # fmt: skip
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(4, 64))
