"""Gated residual that saves 8 bits: `coat_kernels::gated_residual` and `coat_kernels::gated_residual_backward`.

    y = residual + gate · x        gate [S, D] for S equal runs of the rows of x [..., D], or [D]

x is needed for the gradient of gate alone, and kept in 8 bits only then (`formats/README.md`, scaled 8-bit format).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...formats.scaled8 import check_format, check_group
from .._library import LIBRARY
from ..row_values import backend_of, check_rows, check_same, check_segments, check_stored, empty_stored, wide_dtype
from . import cpu, reference

LIBRARY.define("gated_residual(Tensor residual, Tensor x, Tensor gate, str fmt, int group_size, bool save) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    "gated_residual_backward(Tensor dy, Tensor codes, Tensor scale, Tensor gate, str fmt, int group_size, bool need_gate, "
    "bool need_x=True) -> (Tensor, Tensor)"
)


def check_gated_residual(residual: Tensor, x: Tensor, gate: Tensor, fmt: str, group_size: int) -> None:
    """The checks that the op and its fake share."""
    check_rows("x", x)
    check_same("residual", residual, "x", x)
    check_segments("gate", gate, x)
    check_format(fmt, allow_none=True)
    check_group(group_size)


def check_gated_residual_backward(
    dy: Tensor, codes: Tensor, scale: Tensor, gate: Tensor, fmt: str, group_size: int, need_gate: bool
) -> int:
    """The checks that the op and its fake share; returns the number of segments."""
    check_rows("dy", dy)
    if need_gate:
        check_stored(codes, scale, fmt, group_size)
        if codes.shape != dy.shape:
            raise ValueError(f"gate's gradient needs codes of dy's shape {tuple(dy.shape)}, got {tuple(codes.shape)}: pass save=True")
    return check_segments("gate", gate, dy)


def _backend(tensor: Tensor) -> Any:
    return backend_of("gated_residual", tensor, reference, cpu)


def _gated_residual(residual: Tensor, x: Tensor, gate: Tensor, fmt: str, group_size: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_gated_residual(residual, x, gate, fmt, group_size)
    return _backend(x).gated_residual(residual.contiguous(), x.contiguous(), gate.contiguous(), fmt=fmt, group_size=group_size, save=save)


def _gated_residual_fake(residual: Tensor, x: Tensor, gate: Tensor, fmt: str, group_size: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_gated_residual(residual, x, gate, fmt, group_size)
    return torch.empty_like(x, memory_format=torch.contiguous_format), *empty_stored(x, fmt, group_size, save)


def _gated_residual_backward(
    dy: Tensor, codes: Tensor, scale: Tensor, gate: Tensor, fmt: str, group_size: int, need_gate: bool, need_x: bool = True
) -> tuple[Tensor, Tensor]:
    check_gated_residual_backward(dy, codes, scale, gate, fmt, group_size, need_gate)
    return _backend(dy).gated_residual_backward(
        dy.contiguous(),
        codes.contiguous(),
        scale.contiguous(),
        gate.contiguous(),
        fmt=fmt,
        group_size=group_size,
        need_gate=need_gate,
        need_x=need_x,
    )


def _gated_residual_backward_fake(
    dy: Tensor, codes: Tensor, scale: Tensor, gate: Tensor, fmt: str, group_size: int, need_gate: bool, need_x: bool = True
) -> tuple[Tensor, Tensor]:
    segments = check_gated_residual_backward(dy, codes, scale, gate, fmt, group_size, need_gate)
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_x else dy.new_empty(0)
    return dx, dy.new_empty((segments, dy.shape[-1]) if need_gate else 0, dtype=wide_dtype(dy.dtype))


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("gated_residual", _gated_residual, _key)
    LIBRARY.impl("gated_residual_backward", _gated_residual_backward, _key)
torch.library.register_fake("coat_kernels::gated_residual", _gated_residual_fake, lib=LIBRARY)
torch.library.register_fake("coat_kernels::gated_residual_backward", _gated_residual_backward_fake, lib=LIBRARY)
