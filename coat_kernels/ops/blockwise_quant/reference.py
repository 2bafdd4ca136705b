"""The PyTorch backend of blockwise quantize and dequantize: `formats.dynamic8`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.dynamic8 import decode_blocks, encode_blocks


def quantize_blockwise(x: Tensor, *, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    return encode_blocks(x, block_size, signed=signed)


def dequantize_blockwise(codes: Tensor, absmax: Tensor, *, block_size: int, signed: bool, dtype: torch.dtype) -> Tensor:
    return decode_blocks(codes, absmax, block_size, signed=signed).to(dtype)
