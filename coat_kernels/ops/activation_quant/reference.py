"""The PyTorch backend of quantize and dequantize in groups of a row: `formats.scaled8`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.scaled8 import decode, encode


def quantize_activation(x: Tensor, fmt: str, group_size: int, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    return encode(x, fmt, group_size)


def dequantize_activation(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    return decode(codes, scale, fmt, group_size, dtype)
