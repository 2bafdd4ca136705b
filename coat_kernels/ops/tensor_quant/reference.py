"""The PyTorch backend of two-stage group scaling: `formats.scaled8` under one maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import scaled8


def group_amax(x: Tensor, *, group_size: int, amax_shape: torch.Size) -> Tensor:
    return scaled8.group_amax(x, group_size)


def _largest(group_amax: Tensor, scale_shape: torch.Size) -> Tensor:
    """Of each row or of all, in the scale's shape; 0 of nothing."""
    if group_amax.numel() == 0:
        return group_amax.new_zeros(scale_shape)
    return group_amax.amax() if scale_shape == () else group_amax.amax(-1, keepdim=True)


def quantize_with_amax(x: Tensor, group_amax: Tensor, *, fmt: str, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    amax = _largest(group_amax, scale_shape)
    return scaled8.codes_of(x.to(amax.dtype), amax, fmt), scaled8.scale_of(amax, fmt)


def dequantize_tensor(codes: Tensor, scale: Tensor, *, fmt: str, dtype: torch.dtype) -> Tensor:
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    return (scaled8.values_of(codes, fmt, computing) * scale.to(computing)).to(dtype)


def transpose_codes(codes: Tensor) -> Tensor:
    return codes.t().contiguous()
