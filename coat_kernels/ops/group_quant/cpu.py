"""Launcher of the C++ group quantize and dequantize (`csrc/cpu/group_quant.cpp`). Arguments are checked and contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._native import native
from ...formats import num_groups
from ...formats.codecs import Codec
from ...formats.parameters import DTYPE_INDEX


def quantize_group(x: Tensor, *, codec: Codec, group_size: int, signed: bool, rounding: str, key: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = num_groups(x.numel(), group_size)
    codes = torch.empty(codec.codes_shape(x.shape), dtype=torch.uint8)
    amax, k16 = torch.empty(groups), torch.empty(groups, dtype=torch.uint8)
    native.quantize_group(
        x=x.data_ptr(),
        x_dtype=DTYPE_INDEX[x.dtype],
        numel=x.numel(),
        codec=codec.index,
        is_signed=signed,
        group_size=group_size,
        stochastic=rounding == "stochastic",
        key=key,
        codes=codes.data_ptr(),
        amax=amax.data_ptr(),
        k16=k16.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return codes, amax, k16


def dequantize_group(
    codes: Tensor, amax: Tensor, k16: Tensor, *, codec: Codec, group_size: int, dtype: torch.dtype, shape: torch.Size
) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    native.dequantize_group(
        codes=codes.data_ptr(),
        amax=amax.data_ptr(),
        k16=k16.data_ptr(),
        numel=out.numel(),
        codec=codec.index,
        group_size=group_size,
        out=out.data_ptr(),
        out_dtype=DTYPE_INDEX[dtype],
        threads=torch.get_num_threads(),
    )
    return out
