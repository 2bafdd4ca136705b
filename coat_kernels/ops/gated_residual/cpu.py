"""Launcher of the C++ gated residual (`csrc/cpu/gated_residual.cpp`). Arguments are checked and contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._native import native
from ...formats.parameters import DTYPE_INDEX
from ...formats.scaled8 import FORMAT_INDEX
from ..row_values import address, empty_stored, kernel_factor
from .settings import ResidualSettings


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor, settings: ResidualSettings, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, row = x.numel() // x.shape[-1], x.shape[-1]
    factor = kernel_factor(gate)
    y, (codes, scale) = torch.empty_like(x), empty_stored(x, settings.fmt, settings.group_size, save)
    native.gated_residual(
        residual=residual.data_ptr(),
        x=x.data_ptr(),
        dtype=DTYPE_INDEX[x.dtype],
        rows=rows,
        row=row,
        segment_rows=max(rows * row // gate.numel(), 1),
        gate=address(factor),
        gate_dtype=DTYPE_INDEX[factor.dtype],
        fmt=FORMAT_INDEX[settings.fmt],
        group_size=settings.group_size,
        y=y.data_ptr(),
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return y, codes, scale


def gated_residual_backward(
    dy: Tensor, saved: tuple[Tensor, Tensor], gate: Tensor, settings: ResidualSettings, need_gate: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    codes, scale = saved
    row = dy.shape[-1]
    segments, factor = gate.numel() // row, kernel_factor(gate)
    dx = torch.empty_like(dy) if need_x else dy.new_empty(0)
    dgate = torch.empty((segments, row) if need_gate else 0)
    native.gated_residual_backward(
        dy=dy.data_ptr(),
        dtype=DTYPE_INDEX[dy.dtype],
        rows=dy.numel() // row,
        row=row,
        segments=segments,
        gate=address(factor),
        gate_dtype=DTYPE_INDEX[factor.dtype],
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        codes_dtype=DTYPE_INDEX.get(codes.dtype, 0),
        fmt=FORMAT_INDEX[settings.fmt],
        group_size=settings.group_size,
        dx=dx.data_ptr(),
        dgate=dgate.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return dx, dgate
