"""residual + gate · x in plain PyTorch: float32, for float64 input float64. Arguments are checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..row_values import store_values, stored_values, wide_dtype
from .settings import ResidualSettings


def _runs(x: Tensor, gate: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [S, R / S, D] and gate [S, 1, D]."""
    row = x.shape[-1]
    wide_gate = gate.to(dtype).view(-1, 1, row)
    segments = wide_gate.shape[0]
    return x.to(dtype).reshape(segments, x.numel() // (segments * row), row), wide_gate


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor, settings: ResidualSettings, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    runs, factor = _runs(x, gate, wide)
    y = (residual.to(wide) + (runs * factor).view(x.shape)).to(x.dtype)
    if not save:
        return y, x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.float32)
    return y, *store_values(x.to(wide), x.dtype, settings.fmt, settings.group_size)


def gated_residual_backward(
    dy: Tensor, saved: tuple[Tensor, Tensor], gate: Tensor, settings: ResidualSettings, need_gate: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(dy.dtype)
    runs, factor = _runs(dy, gate, wide)
    dx = (runs * factor).to(dy.dtype).view(dy.shape) if need_x else dy.new_empty(0)
    if not need_gate:
        return dx, torch.empty(0, dtype=wide, device=dy.device)
    x = stored_values(*saved, settings.fmt, settings.group_size, wide)
    return dx, (runs * x.reshape(runs.shape)).sum(1)
