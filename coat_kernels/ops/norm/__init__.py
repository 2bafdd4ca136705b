"""RMSNorm and LayerNorm that save 8 bits: `coat_kernels::norm`, `coat_kernels::norm_from_codes` and `coat_kernels::norm_backward`.

    xhat = (x - mean if center) · rstd,   rstd = 1 / sqrt(mean((x - mean if center)²) + eps)
    y    = xhat · (gain + 1 if plus_one) + shift

over the last dimension of x [..., D]; gain and shift are [D], or [S, D] for S equal runs of rows (the samples of a modulation). What the
backward pass needs is xhat in 8 bits (`formats/README.md`, scaled 8-bit format) and rstd: xhat has unit variance whatever x is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...formats.scaled8 import check_format, check_group, num_row_groups
from .._library import LIBRARY, register
from ..row_values import (
    backend_of,
    check_device,
    check_divides,
    check_dtype,
    check_rows,
    check_segments,
    check_stored,
    contiguous,
    empty_stored,
    wide_dtype,
)
from . import cpu, reference
from .settings import NormGradients, NormSettings

LIBRARY.define(
    "norm(Tensor x, Tensor? gain, Tensor? shift, bool center, bool plus_one, float eps, str fmt, int group_size, bool amax, "
    "bool save=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "norm_from_codes(Tensor codes, Tensor scale, Tensor? gain, Tensor? shift, bool plus_one, str fmt, int group_size, ScalarType dtype) "
    "-> Tensor"
)
LIBRARY.define(
    "norm_backward(Tensor dy, Tensor codes, Tensor scale, Tensor rstd, Tensor? gain, bool center, bool plus_one, str fmt, "
    "int group_size, SymInt segments, bool need_gain, bool need_shift, bool need_x=True) -> (Tensor, Tensor, Tensor)"
)


def _check_factors(x: Tensor, gain: Tensor | None, shift: Tensor | None) -> None:
    segments = None if gain is None else check_segments("gain", gain, x)
    if shift is not None:
        of_shift = check_segments("shift", shift, x)
        if segments is not None and segments != of_shift:
            raise ValueError(f"gain has {segments} segments and shift {of_shift}; they must agree")


def _backend(tensor: Tensor) -> Any:
    return backend_of("norm", tensor, reference, cpu)


def _norm_arguments(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    center: bool,
    plus_one: bool,
    eps: float,
    fmt: str,
    group_size: int,
    amax: bool,
    save: bool = True,
) -> tuple[Any, ...]:
    check_rows("x", x)
    check_format(fmt, allow_none=True)
    check_group(group_size)
    _check_factors(x, gain, shift)
    return x, gain, shift, NormSettings(plus_one, fmt, group_size, center), eps, amax, save


def _norm(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, settings: NormSettings, eps: float, amax: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backend(x).norm(x.contiguous(), contiguous(gain), contiguous(shift), settings, eps=eps, amax=amax, save=save)


def _norm_fake(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, settings: NormSettings, eps: float, amax: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes, scale = empty_stored(x, settings.fmt, settings.group_size, save)
    rstd = x.new_empty(x.numel() // x.shape[-1] if save else 0, dtype=wide_dtype(x.dtype))
    y_amax = x.new_empty((*x.shape[:-1], num_row_groups(x.shape[-1], settings.group_size)) if amax else 0, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), codes, scale, rstd, y_amax


def _norm_from_codes_arguments(
    codes: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    plus_one: bool,
    fmt: str,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    check_stored(codes, scale, fmt, group_size)
    _check_factors(codes, gain, shift)
    check_dtype("y", dtype, codes.device)
    return codes, scale, gain, shift, NormSettings(plus_one, fmt, group_size), dtype


def _norm_from_codes(
    codes: Tensor, scale: Tensor, gain: Tensor | None, shift: Tensor | None, settings: NormSettings, dtype: torch.dtype
) -> Tensor:
    backend = reference if dtype == torch.float64 else _backend(codes)
    return backend.norm_from_codes(codes.contiguous(), scale.contiguous(), contiguous(gain), contiguous(shift), settings, dtype)


def _norm_from_codes_fake(
    codes: Tensor, scale: Tensor, gain: Tensor | None, shift: Tensor | None, settings: NormSettings, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _norm_backward_arguments(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor,
    rstd: Tensor,
    gain: Tensor | None,
    center: bool,
    plus_one: bool,
    fmt: str,
    group_size: int,
    segments: int,
    need_gain: bool,
    need_shift: bool,
    need_x: bool = True,
) -> tuple[Any, ...]:
    check_rows("dy", dy)
    check_stored(codes, scale, fmt, group_size)
    if dy.shape != codes.shape:
        raise ValueError(f"dy has shape {tuple(dy.shape)} and codes {tuple(codes.shape)}; they must agree")
    check_device("dy", dy, "codes", codes)
    if rstd.shape != (dy.numel() // dy.shape[-1],):
        raise ValueError(f"rstd must have one entry for each of the {dy.numel() // dy.shape[-1]} rows, got shape {tuple(rstd.shape)}")
    if gain is not None and (of_gain := check_segments("gain", gain, dy)) not in (1, segments):
        raise ValueError(f"gain has {of_gain} segments, but segments={segments}")
    check_divides("norm_backward", segments, dy)
    wanted = NormGradients(segments, need_gain, need_shift, need_x)
    return dy, codes, scale, rstd, gain, NormSettings(plus_one, fmt, group_size, center), wanted


def _norm_backward(
    dy: Tensor, codes: Tensor, scale: Tensor, rstd: Tensor, gain: Tensor | None, settings: NormSettings, wanted: NormGradients
) -> tuple[Tensor, Tensor, Tensor]:
    kept = codes.contiguous(), scale.contiguous(), rstd.contiguous()
    return _backend(dy).norm_backward(dy.contiguous(), *kept, contiguous(gain), settings, wanted)


def _norm_backward_fake(
    dy: Tensor, codes: Tensor, scale: Tensor, rstd: Tensor, gain: Tensor | None, settings: NormSettings, wanted: NormGradients
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if wanted.x else dy.new_empty(0)
    each = (wanted.segments, dy.shape[-1])
    wide = wide_dtype(dy.dtype)
    return dx, dy.new_empty(each if wanted.gain else 0, dtype=wide), dy.new_empty(each if wanted.shift else 0, dtype=wide)


register("norm", _norm_arguments, _norm, _norm_fake)
register("norm_from_codes", _norm_from_codes_arguments, _norm_from_codes, _norm_from_codes_fake)
register("norm_backward", _norm_backward_arguments, _norm_backward, _norm_backward_fake)
