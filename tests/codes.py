"""Codes as places on the number line, for comparing encoders: those of neighbouring values differ by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coat_kernels.formats import Codec
from coat_kernels.formats.reference import unpack_codes


def places(stored: Tensor, codec: Codec, shape: Sequence[int] | None = None) -> Tensor:
    """int32, one an element; NaN codes lie beyond all others. Arguments as in `unpack_codes`."""
    codes = unpack_codes(stored, codec, shape).int()
    if codec.name == "softsign8":
        return torch.where(codes >= 128, codes - 256, codes)
    if codec.is_float:
        magnitude = codes & (codec.sign_bit - 1)
        return torch.where(codes >= codec.sign_bit, -magnitude, magnitude)
    return codes


def codes_at(places: Tensor, codec: Codec) -> Tensor:
    """uint8, one an element; inverse of `places`."""
    if codec.is_float:
        return torch.where(places < 0, codec.sign_bit - places, places).to(torch.uint8)
    return (places & 0xFF).to(torch.uint8)
