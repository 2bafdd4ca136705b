"""Launcher of the C++ norm of heads with rotary embedding (`csrc/cpu/norm_rope.cpp`). Arguments are checked and contiguous."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._native import native
from ...formats.parameters import DTYPE_INDEX
from ..row_values import address, kernel_factor
from .factors import HeadFactors


def _shape(x: Tensor, factors: HeadFactors) -> Any:
    _, tokens, heads, row = x.shape
    weight, first_weight, cos, sin = factors.weight, factors.first_weight, factors.cos, factors.sin
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
        first_tokens=factors.first_tokens,
        cos=address(cos),
        sin=address(sin),
        table_dtype=0 if cos is None else DTYPE_INDEX[cos.dtype],
        table_tokens=factors.table_tokens,
        interleaved=factors.interleaved,
    )


def norm_rope(x: Tensor, factors: HeadFactors, eps: float) -> tuple[Tensor, Tensor]:
    factors = factors.each(kernel_factor)
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1])
    native.norm_rope(_shape(x, factors), x=x.data_ptr(), eps=eps, y=y.data_ptr(), rstd=rstd.data_ptr(), threads=torch.get_num_threads())
    return y, rstd


def norm_rope_backward(
    dy: Tensor, y: Tensor, rstd: Tensor, factors: HeadFactors, *, need_weight: bool, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    factors = factors.each(kernel_factor)
    dx = torch.empty_like(dy) if need_x else dy.new_empty(0)
    dweight = torch.empty(factors.weight.shape if need_weight else 0)
    dfirst = torch.empty(factors.weight.shape if need_weight and factors.first_weight is not None else 0)
    native.norm_rope_backward(
        _shape(y, factors),
        dy=dy.data_ptr(),
        y=y.data_ptr(),
        rstd=rstd.data_ptr(),
        dx=dx.data_ptr(),
        dweight=dweight.data_ptr(),
        dfirst_weight=dfirst.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return dx, dweight, dfirst
