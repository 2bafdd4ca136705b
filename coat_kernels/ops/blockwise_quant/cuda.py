"""Launcher of the CUDA blockwise quantize and dequantize (`csrc/cuda/blockwise_quant.cu`). Arguments are checked and contiguous."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..._cuda import Kernel
from ...formats import num_groups
from ...formats.parameters import DTYPE_INDEX

#: Elements that one turn of a thread block covers, and its threads: `kTile` and `kThreads` of csrc/cuda/elements.h.
TILE, THREADS = 4096, 512
_quantize = Kernel("blockwise_quant", "quantize_blockwise", THREADS)
_dequantize = Kernel("blockwise_quant", "dequantize_blockwise", THREADS)


class _Arguments(ctypes.Structure):
    """`QuantizeArguments`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "absmax")),
        ("numel", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("dtype", "block_size", "is_signed")),
    )


def _launch(kernel: Kernel, x: Tensor, codes: Tensor, absmax: Tensor, block_size: int, signed: bool) -> None:
    arguments = _Arguments(x.data_ptr(), codes.data_ptr(), absmax.data_ptr(), x.numel(), DTYPE_INDEX[x.dtype], block_size, signed)
    kernel.launch(arguments, x.device, -(-x.numel() // TILE))


def quantize_blockwise(x: Tensor, *, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(num_groups(x.numel(), block_size), device=x.device)
    _launch(_quantize, x, codes, absmax, block_size, signed)
    return codes, absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, *, block_size: int, signed: bool, dtype: torch.dtype) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _launch(_dequantize, out, codes, absmax, block_size, signed)
    return out
