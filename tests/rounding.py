"""Bounds of errors that follow from a format or a dtype, for tests that hold kernels against float64."""

from __future__ import annotations

import torch
from torch import Tensor

#: Half a unit in the last place, relative, and half the smallest step, absolute.
_DTYPES = {
    torch.float32: (2.0**-24, 2.0**-150),
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
}
#: The same of a code; int8 has steps of one size.
_CODES = {"e4m3": (2.0**-4, 2.0**-10), "e5m2": (2.0**-3, 2.0**-17), "int8": (0.0, 0.5)}
U32 = 2.0**-24


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of rounding float64 `x` to `dtype`."""
    relative, absolute = _DTYPES[dtype]
    return relative * x.abs() + absolute


def coded(x: Tensor, scale: Tensor, fmt: str, group_size: int) -> Tensor:
    """Largest error of `x` [..., D] as codes with `scale` [..., groups]; of `auto` that of the format each group took."""
    scales = scale.double().repeat_interleave(group_size, -1)[..., : x.shape[-1]]
    if fmt == "auto":
        return torch.where(scales < 0, coded(x, -scale, "int8", group_size), coded(x, scale, "e4m3", group_size))
    relative, absolute = _CODES[fmt]
    # the product with the rounded inverse scale and the code's decoding round in float32
    return relative * x.abs() + absolute * scales.abs() + 4 * U32 * x.abs()


def sum_units(terms: int) -> float:
    """Relative error of a float32 sum of so many terms, of their magnitudes' sum: 16 running sums at least, added in a tree."""
    return (terms / 16 + 16) * U32


def within(got: Tensor, want: Tensor, bound: Tensor) -> bool:
    """|got - want| <= bound everywhere, NaN nowhere."""
    return bool(((got.double() - want).abs() <= bound).all())


def same(got: Tensor, want: Tensor) -> bool:
    """Two variants of a kernel on equal inputs: bit-equal on CPUs; on a GPU each may sum in an order of its own, and round then."""
    if got.device.type == "cpu" or not got.is_floating_point():
        return torch.equal(got, want)
    exact = want.double()
    return got.shape == want.shape and within(got, exact, 32 * U32 * exact.abs().max() + 2 * stored(exact, want.dtype))


def same_codes(got: Tensor, want: Tensor) -> bool:
    """Codes of values that are the `same`: on a GPU a few may lie at a rounding boundary or in a group whose maximum moved."""
    return torch.equal(got, want) if got.device.type == "cpu" else bool((got != want).float().mean() < 0.005)


def sqnr(got: Tensor, want: Tensor) -> float:
    """Signal to quantization noise in dB."""
    got, want = got.detach().double(), want.detach().double()
    noise = (got - want).square().sum()
    return float(10 * torch.log10(want.square().sum() / noise))
