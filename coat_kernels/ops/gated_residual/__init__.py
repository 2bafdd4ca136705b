"""Gated residual that saves 8 bits: `coat_kernels::gated_residual` and `coat_kernels::gated_residual_backward`.

    y = residual + gate · x        gate [S, D] for S equal runs of the rows of x [..., D], or [D]

x is needed for the gradient of gate alone, and kept in 8 bits only then (`formats/README.md`, scaled 8-bit format).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...formats.scaled8 import check_format, check_group
from .._library import LIBRARY, register
from ..row_values import backend_of, check_rows, check_same, check_segments, check_stored, empty_stored, wide_dtype
from . import cpu, reference
from .settings import ResidualSettings

LIBRARY.define("gated_residual(Tensor residual, Tensor x, Tensor gate, str fmt, int group_size, bool save) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    "gated_residual_backward(Tensor dy, Tensor codes, Tensor scale, Tensor gate, str fmt, int group_size, bool need_gate, "
    "bool need_x=True) -> (Tensor, Tensor)"
)


def _backend(tensor: Tensor) -> Any:
    return backend_of("gated_residual", tensor, reference, cpu)


def _gated_residual_arguments(residual: Tensor, x: Tensor, gate: Tensor, fmt: str, group_size: int, save: bool) -> tuple[Any, ...]:
    check_rows("x", x)
    check_same("residual", residual, "x", x)
    check_segments("gate", gate, x)
    check_format(fmt, allow_none=True)
    check_group(group_size)
    return residual, x, gate, ResidualSettings(fmt, group_size), save


def _gated_residual(residual: Tensor, x: Tensor, gate: Tensor, settings: ResidualSettings, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _backend(x).gated_residual(residual.contiguous(), x.contiguous(), gate.contiguous(), settings, save)


def _gated_residual_fake(
    residual: Tensor, x: Tensor, gate: Tensor, settings: ResidualSettings, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, *empty_stored(x, settings.fmt, settings.group_size, save)


def _gated_residual_backward_arguments(
    dy: Tensor, codes: Tensor, scale: Tensor, gate: Tensor, fmt: str, group_size: int, need_gate: bool, need_x: bool = True
) -> tuple[Any, ...]:
    check_rows("dy", dy)
    if need_gate:
        check_stored(codes, scale, fmt, group_size)
        if codes.shape != dy.shape:
            raise ValueError(f"gate's gradient needs codes of dy's shape {tuple(dy.shape)}, got {tuple(codes.shape)}: pass save=True")
    check_segments("gate", gate, dy)
    return dy, (codes, scale), gate, ResidualSettings(fmt, group_size), need_gate, need_x


def _gated_residual_backward(
    dy: Tensor, saved: tuple[Tensor, Tensor], gate: Tensor, settings: ResidualSettings, need_gate: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    codes, scale = saved
    tensors = dy.contiguous(), (codes.contiguous(), scale.contiguous()), gate.contiguous()
    return _backend(dy).gated_residual_backward(*tensors, settings, need_gate, need_x)


def _gated_residual_backward_fake(
    dy: Tensor, saved: tuple[Tensor, Tensor], gate: Tensor, settings: ResidualSettings, need_gate: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    row = dy.shape[-1]
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_x else dy.new_empty(0)
    return dx, dy.new_empty((gate.numel() // row, row) if need_gate else 0, dtype=wide_dtype(dy.dtype))


register("gated_residual", _gated_residual_arguments, _gated_residual, _gated_residual_fake)
register("gated_residual_backward", _gated_residual_backward_arguments, _gated_residual_backward, _gated_residual_backward_fake)
