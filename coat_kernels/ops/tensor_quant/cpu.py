"""Launcher of two-stage group scaling in C++ (`csrc/cpu/tensor_quant.cpp`). Arguments are checked and contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._native import native
from ...formats.parameters import DTYPE_INDEX
from ...formats.scaled8 import FORMAT_INDEX


def _rows(tensor: Tensor, scale_shape: torch.Size) -> dict[str, int]:
    """The tensor as rows that have a scale each: its own, or itself as one."""
    rows = scale_shape.numel()
    return {"rows": rows, "row": tensor.numel() // max(rows, 1), "threads": torch.get_num_threads()}


def group_amax(x: Tensor, *, group_size: int, amax_shape: torch.Size) -> Tensor:
    amax, row = torch.empty(amax_shape), x.shape[-1]
    native.group_amax(
        x=x.data_ptr(),
        x_dtype=DTYPE_INDEX[x.dtype],
        rows=x.numel() // max(row, 1),
        row=row,
        group_size=group_size,
        amax=amax.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return amax


def quantize_with_amax(x: Tensor, group_amax: Tensor, *, fmt: str, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(scale_shape)
    native.quantize_tensor(
        x=x.data_ptr(),
        x_dtype=DTYPE_INDEX[x.dtype],
        amax=group_amax.data_ptr(),
        groups=group_amax.numel() // max(scale.numel(), 1),
        fmt=FORMAT_INDEX[fmt],
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        **_rows(x, scale_shape),
    )
    return codes, scale


def dequantize_tensor(codes: Tensor, scale: Tensor, *, fmt: str, dtype: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype)
    native.dequantize_tensor(
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        fmt=FORMAT_INDEX[fmt],
        out=out.data_ptr(),
        out_dtype=DTYPE_INDEX[dtype],
        **_rows(codes, scale.shape),
    )
    return out


def transpose_codes(codes: Tensor) -> Tensor:
    rows, columns = codes.shape
    out = torch.empty((columns, rows), dtype=codes.dtype)
    native.transpose_bytes(bytes=codes.data_ptr(), rows=rows, columns=columns, out=out.data_ptr(), threads=torch.get_num_threads())
    return out
