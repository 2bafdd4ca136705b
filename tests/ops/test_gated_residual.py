"""The ops `gated_residual` and `gated_residual_backward`: every backend against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.scaled8 import ROW_GROUP_SIZES, SCALED_FORMATS, decode, encode
from tests.rounding import U32, same, stored, sum_units, within

OPS = torch.ops.coat_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(row: int, segments: int, dtype: torch.dtype, device: torch.device, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """residual, x [rows, row] and gate [segments, row]."""
    generator = torch.Generator().manual_seed(0)
    residual, x = (torch.randn(rows, row, generator=generator).to(device, dtype) for _ in range(2))
    return residual, x, torch.randn(segments, row, generator=generator).to(device)


def spread(gate: Tensor, rows: int) -> Tensor:
    return gate.double().repeat_interleave(rows // gate.shape[0], 0)


@pytest.mark.parametrize("row", [1, 7, 16, 96, 100, 128, 3072, 4104])
@pytest.mark.parametrize("segments", [1, 2, 6])
def test_against_float64(row: int, segments: int, machine: torch.device) -> None:
    for dtype in DTYPES:
        residual, x, gate = operands(row, segments, dtype, machine)
        y, codes, scale = OPS.gated_residual(residual, x, gate, "e4m3", 128, True)
        factor = spread(gate, 6)
        product = x.double() * factor
        want = residual.double() + product
        bound = 2 * U32 * (product.abs() + want.abs())
        assert y.dtype == dtype and within(y, want, bound + stored(want.abs() + bound, dtype))
        dy = residual
        dx, dgate = OPS.gated_residual_backward(dy, codes, scale, gate, "e4m3", 128, True)
        exact = dy.double() * factor
        assert within(dx, exact, U32 * exact.abs() + stored(exact.abs() * (1 + U32), dtype))
        terms = (dy.double() * decode(codes, scale, "e4m3", 128, torch.float64)).view(segments, -1, row)
        assert dgate.dtype == torch.float32
        assert within(dgate, terms.sum(1), sum_units(terms.shape[1]) * terms.abs().sum(1) + 2.0**-140)


@pytest.mark.parametrize("fmt", SCALED_FORMATS)
@pytest.mark.parametrize("group_size", ROW_GROUP_SIZES)
def test_codes_are_those_of_the_format(fmt: str, group_size: int, machine: torch.device) -> None:
    for dtype in DTYPES:
        residual, x, gate = operands(300, 2, dtype, machine)
        x[0, 5], x[3, 299] = math.nan, -math.inf
        _, codes, scale = OPS.gated_residual(residual, x, gate, fmt, group_size, True)
        want, want_scale = encode(x, fmt, group_size)
        assert torch.equal(codes, want) and torch.equal(scale, want_scale)


def test_nothing_is_computed_that_is_not_needed(machine: torch.device) -> None:
    residual, x, gate = operands(100, 2, torch.bfloat16, machine)
    y, codes, scale = OPS.gated_residual(residual, x, gate, "auto", 16, True)
    bare = OPS.gated_residual(residual, x, gate, "auto", 16, False)
    assert same(bare[0], y) and bare[1].numel() == bare[2].numel() == 0
    dx, dgate = OPS.gated_residual_backward(residual, codes, scale, gate, "auto", 16, True)
    only_x = OPS.gated_residual_backward(residual, bare[1], bare[2], gate, "auto", 16, False)
    assert same(only_x[0], dx) and only_x[1].numel() == 0
    only_gate = OPS.gated_residual_backward(residual, codes, scale, gate, "auto", 16, True, False)
    assert only_gate[0].numel() == 0 and same(only_gate[1], dgate)


def test_uncompressed(machine: torch.device) -> None:
    residual, x, gate = operands(50, 1, torch.bfloat16, machine)
    _, kept, scale = OPS.gated_residual(residual, x, gate, "none", 16, True)
    assert torch.equal(kept, x) and scale.numel() == 0
    _, dgate = OPS.gated_residual_backward(residual, x, scale, gate, "none", 16, True)
    terms = residual.double() * x.double()
    assert within(dgate, terms.sum(0, keepdim=True), sum_units(6) * terms.abs().sum(0))


def test_many_rows_are_summed_in_one_order(machine: torch.device) -> None:
    dy, x, gate = operands(200, 2, torch.float32, machine, rows=3000)
    _, codes, scale = OPS.gated_residual(dy, x, gate, "e4m3", 64, True)
    arguments = (dy, codes, scale, gate, "e4m3", 64, True)
    threads = torch.get_num_threads()
    first = OPS.gated_residual_backward(*arguments)
    torch.set_num_threads(3)
    second = OPS.gated_residual_backward(*arguments)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    terms = (dy.double() * decode(codes, scale, "e4m3", 64, torch.float64)).view(2, 1500, 200)
    assert within(first[1], terms.sum(1), sum_units(1500) * terms.abs().sum(1))


@pytest.mark.parametrize("rows", [0, 1])
def test_shapes(rows: int, machine: torch.device) -> None:
    x, gate = torch.ones(rows, 20, device=machine), torch.ones(20, device=machine)
    y, codes, scale = OPS.gated_residual(x, x, gate, "int8", 16, True)
    assert y.shape == codes.shape == x.shape and scale.shape == (rows, 2)
    dx, dgate = OPS.gated_residual_backward(x, codes, scale, gate, "int8", 16, True)
    assert dx.shape == x.shape and dgate.shape == (1, 20)
    assert (dgate == rows).all()


def test_opcheck(device: torch.device) -> None:
    residual, x, gate = operands(50, 2, torch.float32, device)
    for save in (True, False):
        torch.library.opcheck(OPS.gated_residual.default, (residual, x, gate, "e4m3", 16, save))
    _, codes, scale = OPS.gated_residual(residual, x, gate, "e4m3", 16, True)
    torch.library.opcheck(OPS.gated_residual_backward.default, (residual, codes, scale, gate, "e4m3", 16, True))


X = torch.ones(2, 3, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": X[..., :31]}, ValueError, r"residual has shape \(2, 3, 31\) and x \(2, 3, 32\); they must agree"),
        ({"residual": X.bfloat16()}, TypeError, "residual is torch.bfloat16 and x torch.float32; they must agree"),
        ({"gate": torch.ones(4, 32)}, ValueError, "gate has 4 segments, which do not divide the 6 rows"),
        ({"fmt": "fp4"}, ValueError, "unknown activation format 'fp4'"),
        ({"group_size": 8}, ValueError, "group size 8 is not offered"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"residual": X, "x": X, "gate": torch.ones(32), "fmt": "e4m3", "group_size": 16, "save": True}
    with pytest.raises(error, match=message):
        OPS.gated_residual(**{**arguments, **change})


def test_the_gradient_of_gate_needs_codes() -> None:
    y, codes, scale = OPS.gated_residual(X, X, torch.ones(32), "e4m3", 16, False)
    with pytest.raises(ValueError, match=r"codes of shape \(0,\)|gate's gradient needs codes"):
        OPS.gated_residual_backward(y, codes, scale, torch.ones(32), "e4m3", 16, True)
