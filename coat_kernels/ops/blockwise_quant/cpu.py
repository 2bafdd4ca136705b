"""Launcher of the C++ blockwise quantize and dequantize (`csrc/cpu/blockwise_quant.cpp`). Arguments are checked and contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._native import native
from ...formats import num_groups
from ...formats.parameters import DTYPE_INDEX


def quantize_blockwise(x: Tensor, *, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    codes, absmax = torch.empty(x.shape, dtype=torch.uint8), torch.empty(num_groups(x.numel(), block_size))
    native.quantize_blockwise(
        x=x.data_ptr(),
        x_dtype=DTYPE_INDEX[x.dtype],
        numel=x.numel(),
        block_size=block_size,
        is_signed=signed,
        codes=codes.data_ptr(),
        absmax=absmax.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return codes, absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, *, block_size: int, signed: bool, dtype: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype)
    native.dequantize_blockwise(
        codes=codes.data_ptr(),
        absmax=absmax.data_ptr(),
        numel=codes.numel(),
        block_size=block_size,
        is_signed=signed,
        out=out.data_ptr(),
        out_dtype=DTYPE_INDEX[dtype],
        threads=torch.get_num_threads(),
    )
    return out
