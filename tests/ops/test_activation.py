"""The activation functions with a saved 8-bit copy: every backend against torch's functions in float64, schemas, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coat_kernels.formats import scaled8
from coat_kernels.ops.activation import reference
from coat_kernels.ops.activation.kinds import KINDS, as_rows

OPS = torch.ops.coat_kernels
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
FORMATS = ("none", "e4m3", "e5m2", "int8", "auto")
WIDTHS = (1, 7, 96, 100, 129, 4096)
#: Half a unit in the last place, relative: what rounding the result to the dtype may cost. float32 results are not rounded again.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
#: Half the smallest float16: relative rounding ends there.
TINY = 2.0**-25
#: Of f, times |x|, and of f', in float32: what the kernels' exponentials and polynomials may be off by. 1 / 2000 of bfloat16's rounding.
FUNCTION_ERROR = 2e-6
dtypes = pytest.mark.parametrize("dtype", list(ROUNDING), ids=lambda dtype: str(dtype).removeprefix("torch."))
kinds = pytest.mark.parametrize("kind", KINDS)
formats = pytest.mark.parametrize("fmt", FORMATS)


def sample(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values around the bend, and tails where the functions are 0 or x."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))
    return x.to(device, dtype)


def value_and_slope(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """In float64."""
    x = x.detach().double().requires_grad_()
    y = FUNCTIONS[kind](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def saved(x: Tensor, fmt: str, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a forward pass keeps, and the values it stands for."""
    if fmt == "none":
        return x, torch.empty(0, device=x.device), x
    codes, scale = scaled8.encode(x, fmt, group_size)
    return codes, scale, scaled8.decode(codes, scale, fmt, group_size)


def assert_within(got: Tensor, want: Tensor, scale: Tensor, error: float = FUNCTION_ERROR) -> None:
    """`scale`: what the functions' error counts relative to."""
    rounding = ROUNDING[got.dtype]
    off = (got.double() - want).abs() - (rounding * want.abs() + (1 + rounding) * error * scale.abs() + TINY)
    assert (off <= 0).all(), f"off by {off.max().item():.3g} more than allowed"


@kinds
def test_the_reference_is_torchs_function(kind: str) -> None:
    """Triton's kernels take constants from it and are held against it in the interpreter."""
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    y, slope = value_and_slope(x, kind)
    assert ((reference.value(x, kind) - y).abs() <= 1e-14 * x.abs()).all()
    got_y, got_slope = reference.value_and_slope(x, kind)
    assert torch.equal(got_y, reference.value(x, kind))
    assert ((got_slope - slope).abs() <= 1e-13).all()


@kinds
@dtypes
def test_forward_and_backward_are_off_by_rounding_alone(kind: str, dtype: torch.dtype, machine: torch.device) -> None:
    for seed, width in enumerate(WIDTHS):
        x, dy = sample((3, width), machine, dtype, seed), sample((3, width), machine, dtype, 100 + seed)
        y = OPS.activation(x, kind, "none", 128, False)[0]
        assert_within(y, value_and_slope(x, kind)[0], x.double())
        for fmt in FORMATS:
            codes, scale, values = saved(x, fmt, 16)
            dx = OPS.activation_backward(dy, codes, scale, kind, fmt, 16)
            assert dx.dtype == dtype and dx.shape == dy.shape
            assert_within(dx, dy.double() * value_and_slope(values, kind)[1], dy.double())


@kinds
def test_functions_are_exact_to_the_stated_error(kind: str, machine: torch.device) -> None:
    tail = torch.logspace(-30, 30, 10001, dtype=torch.float64)
    x = torch.cat([torch.linspace(-20, 20, 300_001, dtype=torch.float64), tail, -tail]).float().to(machine)[None]
    y, slope = value_and_slope(x, kind)
    assert_within(OPS.activation(x, kind, "none", 128, False)[0], y, x.double())
    assert_within(OPS.activation_backward(torch.ones_like(x), x, x.new_empty(0), kind, "none", 128), slope, torch.ones_like(y))


@kinds
@dtypes
def test_gated_forward_and_backward_are_off_by_rounding_alone(kind: str, dtype: torch.dtype, machine: torch.device) -> None:
    for seed, width in enumerate(WIDTHS):
        gate, up, dy = (sample((2, 2, width), machine, dtype, 100 * i + seed) for i in range(3))
        y = OPS.gated_activation(gate, up, kind, "none", 128, False)[0]
        assert_within(y, value_and_slope(gate, kind)[0] * up.double(), gate.double() * up.double())
        for fmt, gate_first in zip(FORMATS, (True, False, True, False, True), strict=True):
            (gate_codes, gate_scale, g), (up_codes, up_scale, u) = saved(gate, fmt, 32), saved(up, fmt, 32)
            packed = OPS.gated_activation_backward(dy, gate_codes, gate_scale, up_codes, up_scale, kind, fmt, 32, gate_first)
            dgate, dup = packed.chunk(2, dim=-1) if gate_first else packed.chunk(2, dim=-1)[::-1]
            value, slope = value_and_slope(g, kind)
            assert_within(dgate, dy.double() * u.double() * slope, dy.double() * u.double())
            assert_within(dup, dy.double() * value, dy.double() * g.double())


@formats
@pytest.mark.parametrize("group_size", scaled8.ROW_GROUP_SIZES)
def test_codes_are_the_formats_and_nothing_else_changes_with_them(fmt: str, group_size: int, machine: torch.device) -> None:
    for width in WIDTHS:
        gate, up = sample((5, width), machine, torch.bfloat16, 1), sample((5, width), machine, torch.bfloat16, 2)
        y, codes, scale, _ = OPS.activation(gate, "silu", fmt, group_size, False)
        product, *both, _ = OPS.gated_activation(gate, up, "silu", fmt, group_size, False)
        if fmt == "none":
            assert [t.numel() for t in (codes, scale, *both)] == [0] * 6
        else:
            want = [*scaled8.encode(gate, fmt, group_size), *scaled8.encode(up, fmt, group_size)]
            for got, expected in zip([codes, scale, *both], want[:2] + want, strict=True):
                assert torch.equal(got, expected)
        assert torch.equal(y, OPS.activation(gate, "silu", "none", 16, False)[0])
        assert torch.equal(product, OPS.gated_activation(gate, up, "silu", "none", 16, False)[0])


@kinds
@formats
def test_rebuilt_outputs_are_those_of_the_decoded_input(kind: str, fmt: str, machine: torch.device) -> None:
    for width in WIDTHS:
        gate, up = sample((4, width), machine, torch.bfloat16, 3), sample((4, width), machine, torch.bfloat16, 4)
        (codes, scale, g), (up_codes, up_scale, u) = saved(gate, fmt, 32), saved(up, fmt, 32)
        y = OPS.activation_from_codes(codes, scale, kind, fmt, 32, torch.bfloat16)
        assert torch.equal(y, OPS.activation(g.float(), kind, "none", 32, False)[0].bfloat16())
        y = OPS.gated_activation_from_codes(codes, scale, up_codes, up_scale, kind, fmt, 32, torch.bfloat16)
        assert torch.equal(y, OPS.gated_activation(g.float(), u.float(), kind, "none", 32, False)[0].bfloat16())


@dtypes
@pytest.mark.parametrize("group_size", scaled8.ROW_GROUP_SIZES)
def test_stage_one_is_the_rounded_outputs_maximum(dtype: torch.dtype, group_size: int, machine: torch.device) -> None:
    for width in WIDTHS:
        gate, up = sample((3, width), machine, dtype, 5), sample((3, width), machine, dtype, 6)
        gate[0, 0], up[1, width // 2], gate[2] = torch.nan, torch.inf, 0
        y, _, _, y_amax = OPS.activation(gate, "gelu", "e4m3", group_size, True)
        assert torch.equal(y_amax, scaled8.group_amax(y, group_size))
        y, *_, y_amax = OPS.gated_activation(gate, up, "gelu", "none", group_size, True)
        assert torch.equal(y_amax, scaled8.group_amax(y, group_size))


@kinds
@formats
def test_tails_and_bad_elements(kind: str, fmt: str, machine: torch.device) -> None:
    x = torch.tensor([[1e30, -1e30, 80.0, -80.0, 12.0, -12.0, 3e-39, 0.0, -0.0, 1.0]], device=machine).repeat(2, 20)
    y, codes, scale, _ = OPS.activation(x, kind, fmt, 128, False)
    want = FUNCTIONS[kind](x.double())
    assert y.isfinite().all()
    assert_within(y, want, x.double())
    assert (y[:, 1::10] == 0).all()  # not 1e30 times a rounding error
    dx = OPS.activation_backward(torch.ones_like(x), x if fmt == "none" else codes, scale, kind, fmt, 128)
    assert dx.isfinite().all()
    bad = x.clone()
    bad[0, 7], bad[0, 130], bad[1, 199] = torch.nan, torch.inf, -torch.inf
    where = bad.isfinite().logical_not()
    clean = torch.where(where, 0, bad)
    good_codes, good_scale = OPS.activation(clean, kind, fmt, 128, False)[1:3]
    y_bad, codes, scale, _ = OPS.activation(bad, kind, fmt, 128, False)
    assert y_bad[0, 7].isnan() and y_bad[0, 130] == torch.inf
    assert torch.equal(y_bad[~where], y[~where])
    dx_bad = OPS.activation_backward(torch.ones_like(x), bad if fmt == "none" else codes, scale, kind, fmt, 128)
    dx = OPS.activation_backward(torch.ones_like(x), clean if fmt == "none" else good_codes, good_scale, kind, fmt, 128)
    assert dx_bad[where].isnan().all()
    assert torch.equal(dx_bad[~where], dx[~where])


@pytest.mark.parametrize("layout", ["halves", "interleaved", "transposed", "three dims"])
def test_strided_inputs(layout: str, machine: torch.device) -> None:
    x = sample((6, 4, 200), machine, torch.bfloat16)
    gate, up = {
        "halves": x.chunk(2, dim=-1),
        "interleaved": (x[..., ::2], x[..., 1::2]),
        "transposed": x.transpose(0, 1).chunk(2, dim=-1),
        "three dims": (x[:, :2, 3:103], x[:, 2:, 3:103]),
    }[layout]
    got = OPS.gated_activation(gate, up, "silu", "auto", 64, True)
    for one, other in zip(got, OPS.gated_activation(gate.contiguous(), up.contiguous(), "silu", "auto", 64, True), strict=True):
        assert one.is_contiguous() and torch.equal(one, other)
    dy = torch.randn_like(got[0])
    packed = OPS.gated_activation_backward(dy, gate, got[2], up, got[4], "silu", "none", 64, True)
    other = OPS.gated_activation_backward(dy, gate.contiguous(), got[2], up.contiguous(), got[4], "silu", "none", 64, True)
    assert torch.equal(packed, other)
    assert torch.equal(OPS.activation(gate, "silu", "e4m3", 64, False)[1], OPS.activation(gate.contiguous(), "silu", "e4m3", 64, False)[1])


def test_halves_of_one_tensor_are_not_copied() -> None:
    x = torch.empty(3, 5, 64)
    for half in x.chunk(2, dim=-1):
        rows, stride = as_rows(half)
        assert rows.data_ptr() == half.data_ptr() and stride == 64
    assert as_rows(x[:, 1:4])[0].is_contiguous()  # rows at two distances
    assert as_rows(x[:, :, :1].expand(3, 5, 32))[1] == 32


@pytest.mark.parametrize("shape", [(0,), (0, 16), (3, 0), (2, 3, 5, 7)])
def test_shapes(shape: tuple[int, ...], machine: torch.device) -> None:
    x = sample(shape, machine, torch.float16)
    y, codes, scale, y_amax = OPS.activation(x, "gelu", "int8", 16, True)
    groups = (*shape[:-1], -(-shape[-1] // 16))
    assert (y.shape, codes.shape, scale.shape, y_amax.shape) == (shape, shape, groups, groups)
    assert OPS.activation_from_codes(codes, scale, "gelu", "int8", 16, torch.float16).shape == shape
    assert OPS.activation_backward(y, codes, scale, "gelu", "int8", 16).shape == shape
    packed = OPS.gated_activation_backward(y, codes, scale, codes, scale, "gelu", "int8", 16, False)
    assert packed.shape == (*shape[:-1], 2 * shape[-1])


@pytest.mark.parametrize("fmt", ["none", "auto"])
def test_opcheck(fmt: str, device: torch.device) -> None:
    x = sample((3, 200), device, torch.bfloat16)
    gate, up = x.chunk(2, dim=-1)
    options = ("gelu", fmt, 64)
    codes, scale, _ = saved(x, fmt, 64)
    gated = (*saved(gate, fmt, 64)[:2], *saved(up, fmt, 64)[:2])
    dy = torch.randn_like(gate)
    torch.library.opcheck(OPS.activation.default, (x, *options, True))
    torch.library.opcheck(OPS.activation_from_codes.default, (codes, scale, *options, torch.float16))
    torch.library.opcheck(OPS.activation_backward.default, (x, codes, scale, *options))
    torch.library.opcheck(OPS.gated_activation.default, (gate, up, *options, True))
    torch.library.opcheck(OPS.gated_activation_from_codes.default, (*gated, *options, torch.bfloat16))
    torch.library.opcheck(OPS.gated_activation_backward.default, (dy, *gated, *options, False))


CODES, SCALE = torch.zeros(4, 40, dtype=torch.uint8), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: OPS.activation(x, "relu", "e4m3", 16, False), ValueError, "unknown activation 'relu'; choose one of gelu_tanh, gelu"),
        (lambda x: OPS.activation(x, "silu", "fp4", 16, False), ValueError, "fp4"),
        (lambda x: OPS.activation(x, "silu", "e4m3", 48, False), ValueError, "48"),
        (lambda x: OPS.activation(x.int(), "silu", "e4m3", 16, False), TypeError, "x must be float32, bfloat16 or float16"),
        (lambda x: OPS.activation(x[0, 0], "silu", "e4m3", 16, False), ValueError, r"no last dimension to make groups of; pass x\[None\]"),
        (lambda x: OPS.gated_activation(x, x[:2], "silu", "e4m3", 16, False), ValueError, "gate and up must agree in shape"),
        (lambda x: OPS.gated_activation(x, x.half(), "silu", "e4m3", 16, False), ValueError, "torch.float16"),
        (lambda x: OPS.activation_backward(x, x, SCALE, "silu", "e4m3", 16), TypeError, "codes of format 'e4m3' must be torch.uint8"),
        (lambda x: OPS.activation_backward(x[:2], CODES, SCALE, "silu", "e4m3", 16), ValueError, "dy and codes must agree"),
        (lambda x: OPS.activation_backward(x, CODES, SCALE, "silu", "e4m3", 32), ValueError, r"scale of shape \(4, 2\), got \(4, 3\)"),
        (lambda x: OPS.activation_from_codes(CODES, SCALE.half(), "silu", "e4m3", 16, torch.float32), TypeError, "must be torch.float32"),
        (
            lambda x: OPS.gated_activation_backward(x, CODES, SCALE, CODES[:2], SCALE[:2], "silu", "e4m3", 16, True),
            ValueError,
            "gate_codes and up_codes must agree",
        ),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(4, 40))
