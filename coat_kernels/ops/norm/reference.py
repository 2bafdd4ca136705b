"""RMSNorm and LayerNorm in plain PyTorch: float32, for float64 input float64. Arguments are checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.scaled8 import group_amax
from ..row_values import store_values, stored_values, wide_dtype
from .settings import NormGradients, NormSettings


def _runs(rows: Tensor, segments: int) -> Tensor:
    """[R, D] -> [S, R / S, D]."""
    return rows.view(segments, rows.shape[0] // segments, rows.shape[1])


def _factor(gain: Tensor | None, plus_one: bool, dtype: torch.dtype) -> Tensor | None:
    """gain (+ 1) as [S, 1, D]."""
    if gain is None:
        return None
    wide = gain.to(dtype).view(-1, 1, gain.shape[-1])
    return wide + 1 if plus_one else wide


def _output(xhat: Tensor, gain: Tensor | None, shift: Tensor | None, plus_one: bool) -> Tensor:
    """xhat [R, D] · gain + shift."""
    factor = _factor(gain, plus_one, xhat.dtype)
    y = xhat if factor is None else (_runs(xhat, factor.shape[0]) * factor).view(xhat.shape)
    offset = _factor(shift, False, xhat.dtype)
    return y if offset is None else (_runs(y, offset.shape[0]) + offset).view(xhat.shape)


def norm(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, settings: NormSettings, *, eps: float, amax: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).to(wide_dtype(x.dtype))
    if settings.center:
        rows = rows - rows.mean(-1, keepdim=True)
    rstd = (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = rows * rstd
    y = _output(xhat, gain, shift, settings.plus_one).to(x.dtype).view(x.shape)
    y_amax = group_amax(y, settings.group_size).float() if amax else x.new_empty(0, dtype=torch.float32)
    if not save:
        return y, x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.float32), rstd.new_empty(0), y_amax
    codes, scale = store_values(xhat.view(x.shape), x.dtype, settings.fmt, settings.group_size)
    return y, codes, scale, rstd.view(-1), y_amax


def norm_from_codes(
    codes: Tensor, scale: Tensor, gain: Tensor | None, shift: Tensor | None, settings: NormSettings, dtype: torch.dtype
) -> Tensor:
    xhat = stored_values(codes, scale, settings.fmt, settings.group_size, wide_dtype(dtype))
    return _output(xhat.reshape(-1, codes.shape[-1]), gain, shift, settings.plus_one).to(dtype).view(codes.shape)


def norm_backward(
    dy: Tensor, codes: Tensor, scale: Tensor, rstd: Tensor, gain: Tensor | None, settings: NormSettings, wanted: NormGradients
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(dy.dtype)
    xhat = stored_values(codes, scale, settings.fmt, settings.group_size, wide).reshape(-1, dy.shape[-1])
    rows = dy.reshape(-1, dy.shape[-1]).to(wide)
    dx, none = dy.new_empty(0), torch.empty(0, dtype=wide, device=dy.device)
    if wanted.x:
        factor = _factor(gain, settings.plus_one, wide)
        grad = rows if factor is None else (_runs(rows, factor.shape[0]) * factor).view(rows.shape)
        along = (grad * xhat).mean(-1, keepdim=True)
        inner = grad - xhat * along
        if settings.center:
            inner = inner - grad.mean(-1, keepdim=True)
        dx = (inner * rstd.view(-1, 1)).to(dy.dtype).view(dy.shape)
    dgain = _runs(rows * xhat, wanted.segments).sum(1) if wanted.gain else none
    dshift = _runs(rows, wanted.segments).sum(1) if wanted.shift else none
    return dx, dgain, dshift
