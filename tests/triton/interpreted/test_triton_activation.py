"""The activation functions' GPU kernels in the interpreter: codes bit for bit, values within rounding and the units' documented error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coat_kernels.formats import scaled8
from coat_kernels.ops.activation import reference
from coat_kernels.ops.activation import triton as kernel
from coat_kernels.ops.activation.kinds import KINDS
from coat_kernels.ops.activation.settings import ActivationSettings

FORMATS = ("none", "e4m3", "e5m2", "int8", "auto")
#: As in tests/ops/test_activation.py; the special function unit's 2^-22 is part of it.
FUNCTION_ERROR = 2e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


def sample(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))).to(dtype)


def assert_within(got: Tensor, want: Tensor, scale: Tensor) -> None:
    rounding = ROUNDING[got.dtype]
    limit = rounding * want.abs() + (1 + rounding) * FUNCTION_ERROR * scale.abs() + 1e-30
    off = (got.double() - want).abs() - limit
    assert (off <= 0).all(), f"off by {off.max().item():.3g} more than allowed"


def saved(x: Tensor, fmt: str, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a forward pass keeps, and its values in float64."""
    if fmt == "none":
        return x, x.new_empty(0), x.double()
    codes, scale = scaled8.encode(x, fmt, group_size)
    return codes, scale, scaled8.decode(codes, scale, fmt, group_size).double()


CASES = [(kind, fmt) for i, kind in enumerate(KINDS) for fmt in (FORMATS if i == 0 else ("none", FORMATS[i]))]
cases = pytest.mark.parametrize("kind, fmt", CASES)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain(kind: str, fmt: str, dtype: torch.dtype) -> None:
    settings = ActivationSettings(kind, fmt, 128)
    for width in (256, 100):
        x, dy = sample(3, 2, width, dtype=dtype), sample(3, 2, width, dtype=dtype, seed=1)
        codes, scale, values = saved(x, fmt, 128)
        y, *kept, y_amax = kernel.activation(x, settings, amax=True)
        assert_within(y, reference.value(x.double(), kind), x.double())
        assert torch.equal(y_amax, scaled8.group_amax(y, 128))
        if fmt != "none":
            assert torch.equal(kept[0], codes) and torch.equal(kept[1], scale)
        rebuilt = kernel.activation_from_codes((codes, scale), settings, dtype)
        assert_within(rebuilt, reference.value(values, kind), values)
        dx = kernel.activation_backward(dy, (codes, scale), settings)
        assert_within(dx, dy.double() * reference.value_and_slope(values, kind)[1], dy.double())


@cases
def test_gated_on_halves_of_one_tensor(kind: str, fmt: str) -> None:
    for width, gate_first in ((128, True), (71, False)):
        halves = sample(3, 2, 2 * width).chunk(2, dim=-1)
        gate, up = halves if gate_first else halves[::-1]
        dy = sample(3, 2, width, seed=1)
        (codes, scale, g), (up_codes, up_scale, u) = saved(gate, fmt, 64), saved(up, fmt, 64)
        settings = ActivationSettings(kind, fmt, 64)
        both = (codes, scale), (up_codes, up_scale)
        y, *kept, y_amax = kernel.gated_activation(gate, up, settings, amax=True)
        exact = gate.double(), up.double()
        assert_within(y, reference.value(exact[0], kind) * exact[1], exact[0] * exact[1])
        assert torch.equal(y_amax, scaled8.group_amax(y, 64))
        if fmt != "none":
            assert all(torch.equal(got, want) for got, want in zip(kept, (codes, scale, up_codes, up_scale), strict=True))
        rebuilt = kernel.gated_activation_from_codes(*both, settings, torch.bfloat16)
        assert_within(rebuilt, reference.value(g, kind) * u, g * u)
        packed = kernel.gated_activation_backward(dy, *both, settings, gate_first)
        dgate, dup = packed.chunk(2, dim=-1) if gate_first else packed.chunk(2, dim=-1)[::-1]
        value, slope = reference.value_and_slope(g, kind)
        assert_within(dgate, dy.double() * u * slope, dy.double() * u)
        assert_within(dup, dy.double() * value, dy.double() * g)


@cases
def test_tails_and_bad_elements(kind: str, fmt: str) -> None:
    x = torch.tensor([[1e30, -1e30, 80.0, -80.0, 12.0, -12.0, 3e-39, 0.0, -0.0, 1.0]]).repeat(2, 20)
    bad = x.clone()
    bad[0, 7], bad[0, 130], bad[1, 199] = torch.nan, torch.inf, -torch.inf
    where = ~bad.isfinite()
    results, settings = [], ActivationSettings(kind, fmt, 128)
    for values in (torch.where(where, 0, bad), bad):
        y, codes, scale, _ = kernel.activation(values, settings, amax=False)
        codes = values if fmt == "none" else codes
        results += [y, kernel.activation_backward(torch.ones_like(x), (codes, scale), settings)]
    y, dx, bad_y, bad_dx = results
    assert y.isfinite().all() and dx.isfinite().all()
    assert (y[:, 1::10][~where[:, 1::10]] == 0).all()
    same = ~where
    torch.testing.assert_close(bad_y[same], y[same], rtol=2e-6, atol=1e-30)  # the units' errors are drawn anew in each launch
    torch.testing.assert_close(bad_dx[same], dx[same], rtol=2e-5, atol=2e-6)
    assert bad_dx[where].isnan().all() and bad_y[0, 7].isnan()


def test_empty() -> None:
    settings = ActivationSettings("silu", "auto", 16)
    for shape in ((0, 16), (3, 0)):
        y, codes, scale, _ = kernel.activation(torch.zeros(shape), settings, amax=True)
        assert kernel.gated_activation_backward(y, (codes, scale), (codes, scale), settings, gate_first=True).numel() == 0
