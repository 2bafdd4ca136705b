"""Launcher of the C++ norms (`csrc/cpu/norm.cpp`). Arguments are checked and contiguous."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._native import native
from ...formats.parameters import DTYPE_INDEX
from ...formats.scaled8 import FORMAT_INDEX, num_row_groups
from ..row_values import address, empty_stored, kernel_factor
from .settings import NormGradients, NormSettings


def _factors(x: Tensor, gain: Tensor | None, shift: Tensor | None, plus_one: bool) -> dict[str, Any]:
    """What kernels are told of gain and shift, each [D] or [S, D]."""
    rows, row = x.numel() // x.shape[-1], x.shape[-1]
    given = gain if gain is not None else shift
    segments = 1 if given is None else given.numel() // row
    return {
        "gain": address(gain),
        "gain_dtype": 0 if gain is None else DTYPE_INDEX[gain.dtype],
        "plus_one": plus_one,
        "segment_rows": max(rows // segments, 1),
    }


def _shift(shift: Tensor | None) -> dict[str, int]:
    return {"shift": address(shift), "shift_dtype": 0 if shift is None else DTYPE_INDEX[shift.dtype]}


def norm(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, settings: NormSettings, *, eps: float, amax: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, row = x.numel() // x.shape[-1], x.shape[-1]
    gain, shift = kernel_factor(gain), kernel_factor(shift)
    y, (codes, scale) = torch.empty_like(x), empty_stored(x, settings.fmt, settings.group_size, save)
    rstd = torch.empty(rows if save else 0)
    y_amax = torch.empty((*x.shape[:-1], num_row_groups(row, settings.group_size)) if amax else 0)
    native.norm(
        x=x.data_ptr(),
        dtype=DTYPE_INDEX[x.dtype],
        rows=rows,
        row=row,
        **_factors(x, gain, shift, settings.plus_one),
        **_shift(shift),
        center=settings.center,
        eps=eps,
        fmt=FORMAT_INDEX[settings.fmt],
        group_size=settings.group_size,
        y=y.data_ptr(),
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        rstd=rstd.data_ptr(),
        y_amax=y_amax.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return y, codes, scale, rstd, y_amax


def norm_from_codes(
    codes: Tensor, scale: Tensor, gain: Tensor | None, shift: Tensor | None, settings: NormSettings, dtype: torch.dtype
) -> Tensor:
    y = torch.empty(codes.shape, dtype=dtype)
    gain, shift = kernel_factor(gain), kernel_factor(shift)
    native.norm_from_codes(
        codes=codes.data_ptr(),
        codes_dtype=DTYPE_INDEX.get(codes.dtype, 0),
        scale=scale.data_ptr(),
        rows=codes.numel() // codes.shape[-1],
        row=codes.shape[-1],
        **_factors(codes, gain, shift, settings.plus_one),
        **_shift(shift),
        fmt=FORMAT_INDEX[settings.fmt],
        group_size=settings.group_size,
        y=y.data_ptr(),
        dtype=DTYPE_INDEX[dtype],
        threads=torch.get_num_threads(),
    )
    return y


def norm_backward(
    dy: Tensor, codes: Tensor, scale: Tensor, rstd: Tensor, gain: Tensor | None, settings: NormSettings, wanted: NormGradients
) -> tuple[Tensor, Tensor, Tensor]:
    row = dy.shape[-1]
    gain = kernel_factor(gain)
    dx = torch.empty_like(dy) if wanted.x else dy.new_empty(0)
    dgain, dshift = (torch.empty((wanted.segments, row) if need else 0) for need in (wanted.gain, wanted.shift))
    native.norm_backward(
        dy=dy.data_ptr(),
        dtype=DTYPE_INDEX[dy.dtype],
        rows=dy.numel() // row,
        row=row,
        codes=codes.data_ptr(),
        codes_dtype=DTYPE_INDEX.get(codes.dtype, 0),
        scale=scale.data_ptr(),
        rstd=rstd.data_ptr(),
        **_factors(dy, gain, None, settings.plus_one),
        center=settings.center,
        fmt=FORMAT_INDEX[settings.fmt],
        group_size=settings.group_size,
        segments=wanted.segments,
        dx=dx.data_ptr(),
        dgain=dgain.data_ptr(),
        dshift=dshift.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return dx, dgain, dshift
