"""How an updated float32 parameter is stored in its own dtype: README.md, "Stochastic rounding" and "24-bit parameters"."""

from __future__ import annotations

import torch
from torch import Tensor

from .random import half_words

PARAM_ROUNDINGS = ("nearest", "stochastic", "split")
#: The dtypes of parameters and gradients, and the numbers kernels know them by.
DTYPE_INDEX = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PARAM_DTYPES = tuple(DTYPE_INDEX)


def check_param_rounding(param_rounding: str) -> str:
    if param_rounding not in PARAM_ROUNDINGS:
        raise ValueError(f"unknown param_rounding {param_rounding!r}; choose one of {', '.join(map(repr, PARAM_ROUNDINGS))}")
    return param_rounding


def round_stochastic(x: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """float32 `x` to bfloat16 or float16, up or down with odds that keep its expectation.

    `key` is the generator's (`random.stream_key`); non-finite values pass unchanged.
    """
    draw = half_words(key, x.numel(), x.device).view(x.shape)
    bits = x.contiguous().view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((bits.to(torch.int64) + draw) >> 16).to(torch.int16).view(torch.bfloat16)
    else:
        exponent = (((bits >> 23) & 0xFF) - 127).clamp(min=-14)
        ulp = torch.ldexp(torch.ones_like(x), exponent - 10)
        rounded = torch.copysign(torch.floor(x.abs() / ulp + (draw >> 3) / 8192) * ulp, x).to(dtype)
    return torch.where(torch.isfinite(x), rounded, x.to(dtype))


def split_encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 `x` as bfloat16 and an int8 residual: 24 of its bits in 3 bytes."""
    bits = x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    top24 = (bits + 0x80) >> 8
    high = (top24 + 0x80) >> 8
    residual = top24 - (high << 8)
    nan = torch.isnan(x)
    high = torch.where(nan, 0x7FC0, high & 0xFFFF)
    high = torch.where(high >= 0x8000, high - 0x10000, high)
    return high.to(torch.int16).view(torch.bfloat16), torch.where(nan, 0, residual).to(torch.int8)


def split_decode(param: Tensor, residual: Tensor) -> Tensor:
    """float32 value of a bfloat16 parameter and its int8 residual."""
    high = param.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    bits = (((high << 8) + residual) << 8) & 0xFFFFFFFF
    bits = torch.where(bits >= 0x80000000, bits - 0x100000000, bits)
    return bits.to(torch.int32).view(torch.float32)
