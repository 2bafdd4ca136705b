"""Launcher of C++ quantize and dequantize in groups of a row (`csrc/cpu/activation_quant.cpp`). Arguments are checked and contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._native import native
from ...formats.parameters import DTYPE_INDEX
from ...formats.scaled8 import FORMAT_INDEX


def quantize_activation(x: Tensor, fmt: str, group_size: int, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(scale_shape)
    row = x.shape[-1]
    native.quantize_activation(
        x=x.data_ptr(),
        x_dtype=DTYPE_INDEX[x.dtype],
        rows=x.numel() // max(row, 1),
        row=row,
        fmt=FORMAT_INDEX[fmt],
        group_size=group_size,
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return codes, scale


def dequantize_activation(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype)
    row = codes.shape[-1]
    native.dequantize_activation(
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        rows=codes.numel() // max(row, 1),
        row=row,
        fmt=FORMAT_INDEX[fmt],
        group_size=group_size,
        out=out.data_ptr(),
        out_dtype=DTYPE_INDEX[dtype],
        threads=torch.get_num_threads(),
    )
    return out
