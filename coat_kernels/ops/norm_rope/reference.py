"""RMSNorm of heads and rotary embedding in plain PyTorch: float32, for float64 input float64. Arguments are checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..row_values import wide_dtype
from .factors import HeadFactors


def _halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second of each rotated pair."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _join(a: Tensor, b: Tensor, interleaved: bool) -> Tensor:
    return torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)


def _tables(factors: HeadFactors, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """cos and sin of the two of each pair, [1 or B, T, 1, dh / 2]."""
    if factors.cos is None or factors.sin is None:
        return None
    cos, sin = (table.to(dtype).view(-1, x.shape[1], 1, x.shape[3]) for table in (factors.cos, factors.sin))
    return *_halves(cos, factors.interleaved), *_halves(sin, factors.interleaved)


def _weights(factors: HeadFactors, tokens: int, dtype: torch.dtype) -> Tensor:
    """[T, 1, dh]."""
    each = factors.weight.to(dtype).expand(tokens, -1)
    if factors.first_weight is not None:
        each = torch.cat((factors.first_weight.to(dtype).expand(factors.first_tokens, -1), each[factors.first_tokens :]))
    return each.unsqueeze(1)


def norm_rope(x: Tensor, factors: HeadFactors, eps: float) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    heads = x.to(wide)
    rstd = (heads.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = heads * rstd * _weights(factors, x.shape[1], wide)
    tables = _tables(factors, x, wide)
    if tables is not None:
        cos_a, cos_b, sin_a, sin_b = tables
        a, b = _halves(y, factors.interleaved)
        y = _join(a * cos_a - b * sin_a, b * cos_b + a * sin_b, factors.interleaved)
    return y.to(x.dtype), rstd.squeeze(-1)


def norm_rope_backward(
    dy: Tensor, y: Tensor, rstd: Tensor, factors: HeadFactors, *, need_weight: bool, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(dy.dtype)
    grad, normed = dy.to(wide), y.to(wide)
    tables = _tables(factors, y, wide)
    if tables is not None:
        cos_a, cos_b, sin_a, sin_b = tables
        determinant = cos_a * cos_b + sin_a * sin_b
        inverse = torch.where(determinant == 0, 0, 1 / determinant)  # tables of zeros: padding, which has no gradient
        a, b = _halves(normed, factors.interleaved)
        normed = _join((cos_b * a + sin_a * b) * inverse, (cos_a * b - sin_b * a) * inverse, factors.interleaved)
        a, b = _halves(grad, factors.interleaved)
        grad = _join(cos_a * a + sin_b * b, cos_b * b - sin_a * a, factors.interleaved)
    weights = _weights(factors, y.shape[1], wide)
    xhat = torch.where(weights == 0, 0, normed / weights)
    dx, none = dy.new_empty(0), torch.empty(0, dtype=wide, device=dy.device)
    if need_x:
        along = (grad * normed).mean(-1, keepdim=True)
        dx = ((grad * weights - xhat * along) * rstd.unsqueeze(-1)).to(dy.dtype)
    if not need_weight:
        return dx, none, none
    products = grad * xhat
    first = products[:, : factors.first_tokens].sum((0, 1, 2)) if factors.first_weight is not None else none
    return dx, products[:, factors.first_tokens :].sum((0, 1, 2)), first
