"""The PyTorch backend of group quantize and dequantize: `formats.reference` in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.codecs import Codec
from ...formats.reference import decode_group, encode_group


def quantize_group(x: Tensor, *, codec: Codec, group_size: int, signed: bool, rounding: str, key: int) -> tuple[Tensor, Tensor, Tensor]:
    return encode_group(x, codec, group_size, signed=signed, rounding=rounding, key=key)


def dequantize_group(
    codes: Tensor, amax: Tensor, k16: Tensor, *, codec: Codec, group_size: int, dtype: torch.dtype, shape: torch.Size
) -> Tensor:
    return decode_group(codes, amax, k16, codec, group_size, shape=shape).to(dtype)
