"""The scaled 8-bit formats of activations in plain PyTorch: README.md, "Scaled 8-bit (activations)".

Codes of e4m3, e5m2 or int8 with one float32 scale for each group of a row (`encode`, `decode`), or for any other set of elements whose
largest magnitude is known (`scale_of`, `codes_of`). Float32 arithmetic whatever the input; float64 input is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codecs import CODECS, check_group_size, num_groups
from .reference import code_values, round_to_code

#: What kernels know a format by. "none" is no compression and belongs to the ops that offer it.
FORMAT_INDEX = {"none": 0, "e4m3": 1, "e5m2": 2, "int8": 3, "auto": 4}
SCALED_FORMATS = ("e4m3", "e5m2", "int8", "auto")
#: One scale of a whole tensor or row has no sign bit to spend on a choice.
SINGLE_FORMATS = ("e4m3", "e5m2", "int8")
ROW_GROUP_SIZES = (16, 32, 64, 128, 256)
#: The largest code's value.
MAX = {"e4m3": CODECS["e4m3"].max, "e5m2": CODECS["e5m2"].max, "int8": 127.0}
#: Of a NaN or infinite element; it decodes to NaN.
NAN_CODES = {"e4m3": 0x7F, "e5m2": 0x7F, "int8": 0x80}
#: Smaller maxima are raised to this: neither a scale nor its inverse leaves the normal range, and zeros divide nothing by zero.
MIN_AMAX = 2.0**-100
#: `auto` takes int8 where AUTO_SQUARES · S > AUTO_BASE + AUTO_ELEMENT · n, S the sum of the squared int8 codes of n elements:
#: sum x^2 - amax^2 > 0.00728 · n · amax^2 in integers, with 0.00728 · 127^2 = 5871 / 50.
AUTO_SQUARES, AUTO_BASE, AUTO_ELEMENT = 50, 806450, 5871


def check_format(fmt: str, allow_none: bool = False) -> str:
    """`fmt` if it is a scaled format, or "none" where that is allowed; `ValueError` names the known ones."""
    known = ("none", *SCALED_FORMATS) if allow_none else SCALED_FORMATS
    if fmt not in known:
        raise ValueError(f"unknown activation format {fmt!r}; known formats: {', '.join(known)}")
    return fmt


def check_single_format(fmt: str) -> str:
    """`fmt` if one scale for a tensor or a row can carry it."""
    if fmt not in SINGLE_FORMATS:
        raise ValueError(f"format {fmt!r} cannot go with one scale for a tensor or a row; known formats: {', '.join(SINGLE_FORMATS)}")
    return fmt


def check_group(group_size: int) -> int:
    return check_group_size(group_size, ROW_GROUP_SIZES)


def num_row_groups(row: int, group_size: int) -> int:
    """Groups of a row of `row` elements; the last one may be shorter."""
    return num_groups(row, group_size)


def _row_groups(x: Tensor, group_size: int) -> Tensor:
    """`x` [..., D] as [..., ceil(D / G), G], padded with zeros, which no rule counts."""
    groups = num_row_groups(x.shape[-1], group_size)
    padded = torch.nn.functional.pad(x, (0, groups * group_size - x.shape[-1]))
    return padded.view(*x.shape[:-1], groups, group_size)


def _ungroup(groups: Tensor, row: int) -> Tensor:
    return groups.flatten(-2)[..., :row].contiguous()


def _finite_magnitudes(x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x), x.abs(), 0)


def _computing(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def group_amax(x: Tensor, group_size: int) -> Tensor:
    """Largest finite magnitude of each group of `x` [..., D]: float32 (float64 of float64) [..., ceil(D / G)], 0 where there is none."""
    return _finite_magnitudes(_row_groups(_computing(x), group_size)).amax(-1)


def scale_of(amax: Tensor, fmt: str) -> Tensor:
    """The scale of elements whose largest finite magnitude is `amax`."""
    floored = amax.clamp(min=MIN_AMAX)
    return floored / torch.full_like(floored, MAX[fmt])  # by a scalar, some devices multiply with its rounded inverse


def codes_of(x: Tensor, amax: Tensor, fmt: str) -> Tensor:
    """uint8 codes of `x` under `amax`, which broadcasts against it.

    Args:
        x: float32 or float64.
        amax: of x's dtype; magnitudes above it saturate.
        fmt: one of `SINGLE_FORMATS`.
    """
    floored = amax.clamp(min=MIN_AMAX)
    scaled = x * (torch.full_like(floored, MAX[fmt]) / floored)
    finite = torch.isfinite(x)
    magnitude = torch.where(finite, scaled.abs(), 0).clamp(max=MAX[fmt])
    if fmt == "int8":
        steps = torch.round(magnitude).to(torch.int64)
        codes = torch.where(scaled < 0, -steps, steps) & 0xFF
    else:
        steps = round_to_code(magnitude, CODECS[fmt])
        codes = torch.where((scaled < 0) & (steps > 0), steps | 0x80, steps)
    return torch.where(finite, codes, NAN_CODES[fmt]).to(torch.uint8)


def values_of(codes: Tensor, fmt: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What uint8 `codes` of any shape stand for before their scale; `fmt` one of `SINGLE_FORMATS`."""
    if fmt == "int8":
        number = codes.view(torch.int8)
        return torch.where(number == -128, torch.nan, number.to(dtype))
    table = code_values(CODECS[fmt], dtype, codes.device)
    if fmt == "e5m2":
        table[0x7C], table[0xFC] = torch.inf, -torch.inf  # no encoder writes them
    return table[codes.to(torch.int64)]


def _takes_int8(codes: Tensor, row: int, group_size: int) -> Tensor:
    """The rule of `auto`, bool [..., groups], from int8 codes [..., groups, G]."""
    numbers = codes.view(torch.int8).to(torch.int64)
    squares = torch.where(numbers == -128, 0, numbers * numbers).sum(-1)
    lengths = torch.full_like(squares, group_size)
    if lengths.shape[-1] > 0:
        lengths[..., -1] = row - (lengths.shape[-1] - 1) * group_size
    return AUTO_SQUARES * squares > AUTO_BASE + AUTO_ELEMENT * lengths


def encode(x: Tensor, fmt: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x` in groups along its last dimension.

    Args:
        x: [..., D] of any float dtype, read as float32 (float64: computed in float64, scales too).
        fmt: one of `SCALED_FORMATS`.
        group_size: one of `ROW_GROUP_SIZES`.

    Returns:
        codes uint8 [..., D], scale float32 [..., ceil(D / G)]; with `auto`, a negative scale marks an int8 group.
    """
    check_format(fmt)
    groups, row = _row_groups(_computing(x), check_group(group_size)), x.shape[-1]
    amax = _finite_magnitudes(groups).amax(-1)
    if fmt != "auto":
        return _ungroup(codes_of(groups, amax[..., None], fmt), row), scale_of(amax, fmt)
    numbers, floats = codes_of(groups, amax[..., None], "int8"), codes_of(groups, amax[..., None], "e4m3")
    int8 = _takes_int8(numbers, row, group_size)
    codes = torch.where(int8[..., None], numbers, floats)
    return _ungroup(codes, row), torch.where(int8, -scale_of(amax, "int8"), scale_of(amax, "e4m3"))


def decode(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., D] of `encode`'s codes and scales: code · scale in float32 (float64 for `dtype` float64), rounded once to `dtype`."""
    check_format(fmt)
    groups, row = _row_groups(codes, check_group(group_size)), codes.shape[-1]
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    factor = scale.to(computing)[..., None]
    if fmt == "auto":
        values = torch.where(torch.signbit(factor), values_of(groups, "int8", computing), values_of(groups, "e4m3", computing))
    else:
        values = values_of(groups, fmt, computing)
    return _ungroup(values * factor.abs(), row).to(dtype)
