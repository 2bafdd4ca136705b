"""Launcher of the C++ norm of heads with rotary embedding (`csrc/cpu/norm_rope.cpp`). Arguments are checked and contiguous."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._native import native
from ...formats.parameters import DTYPE_INDEX
from ..row_values import address, kernel_factor


def _shape(
    x: Tensor,
    weight: Tensor,
    first_weight: Tensor | None,
    first_tokens: int,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> Any:
    _, tokens, heads, row = x.shape
    return native.NormRopeShape(
        dtype=DTYPE_INDEX[x.dtype],
        rows=x.numel() // row,
        row=row,
        heads=max(heads, 1),
        tokens=max(tokens, 1),
        weight=weight.data_ptr(),
        weight_dtype=DTYPE_INDEX[weight.dtype],
        first_weight=address(first_weight),
        first_weight_dtype=0 if first_weight is None else DTYPE_INDEX[first_weight.dtype],
        first_tokens=first_tokens,
        cos=address(cos),
        sin=address(sin),
        table_dtype=0 if cos is None else DTYPE_INDEX[cos.dtype],
        table_tokens=1 if cos is None else max(cos.numel() // row, 1),
        interleaved=interleaved,
    )


def norm_rope(
    x: Tensor,
    weight: Tensor,
    first_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    first_tokens: int,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    factors = [kernel_factor(tensor) for tensor in (weight, first_weight, cos, sin)]
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1])
    shape = _shape(x, factors[0], factors[1], first_tokens, factors[2], factors[3], interleaved)
    native.norm_rope(shape, x=x.data_ptr(), eps=eps, y=y.data_ptr(), rstd=rstd.data_ptr(), threads=torch.get_num_threads())
    return y, rstd


def norm_rope_backward(
    dy: Tensor,
    y: Tensor,
    rstd: Tensor,
    weight: Tensor,
    first_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    first_tokens: int,
    interleaved: bool,
    need_weight: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    factors = [kernel_factor(tensor) for tensor in (weight, first_weight, cos, sin)]
    dx = torch.empty_like(dy) if need_x else dy.new_empty(0)
    dweight = torch.empty(weight.shape if need_weight else 0)
    dfirst = torch.empty(weight.shape if need_weight and first_weight is not None else 0)
    native.norm_rope_backward(
        _shape(y, factors[0], factors[1], first_tokens, factors[2], factors[3], interleaved),
        dy=dy.data_ptr(),
        y=y.data_ptr(),
        rstd=rstd.data_ptr(),
        dx=dx.data_ptr(),
        dweight=dweight.data_ptr(),
        dfirst_weight=dfirst.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return dx, dweight, dfirst
