"""Encode and decode of every codec in plain PyTorch: the executable form of README.md.

Pure functions of their arguments, on any device, in float32 or (``dtype=torch.float64``) with exact logarithms.
Tests hold every kernel against these; where no kernel can be built they serve.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .codecs import LOG2_SLACK_Q11, MAX_OCTAVES, NAN_CODE, Codec, num_groups
from .random import uniform8

_INF_BITS = 0x7F800000


def _groups(x: Tensor, group_size: int) -> Tensor:
    """Flat `x` as [n_groups, group_size]; the last group is padded with zeros, which no rule counts."""
    n_groups = num_groups(x.numel(), group_size)
    padded = x.new_zeros(n_groups * group_size)
    padded[: x.numel()] = x.reshape(-1)
    return padded.view(n_groups, group_size)


def group_metadata(x: Tensor, codec: Codec, group_size: int) -> tuple[Tensor, Tensor]:
    """`amax` float32 [n_groups] and `k16` uint8 [n_groups] of float32 `x`. Integer arithmetic: exact on every backend."""
    bits = _groups(x.to(torch.float32), group_size).view(torch.int32) & 0x7FFFFFFF
    bits = torch.where(bits < _INF_BITS, bits, 0)
    max_bits = bits.amax(dim=1)
    min_bits = torch.where(bits > 0, bits, _INF_BITS).amin(dim=1)
    spread = (max_bits - min_bits).clamp(min=0)
    if codec.name == "log8":
        step = 254 * 2048
        k16 = ((250 * ((spread >> 12) + LOG2_SLACK_Q11) + step - 1) // step).clamp(1, 255)
        k16 = torch.where(max_bits > 0, k16, 1)
    elif codec.expand:
        k16 = codec.range_q15 // (spread >> 8).clamp(1, MAX_OCTAVES << 15)
        k16 = torch.where(max_bits > 0, k16.clamp(1, 255), 16)
    else:
        k16 = torch.full_like(max_bits, 16)
    return max_bits.view(torch.float32), k16.to(torch.uint8)


def code_values(codec: Codec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """[256] the number each FP8 code stands for (NaN and inf codes included)."""
    code = torch.arange(256, device=device)
    mantissa = (code & ((1 << codec.mantissa_bits) - 1)).to(dtype) / (1 << codec.mantissa_bits)
    exponent = (code & 0x7F) >> codec.mantissa_bits
    normal = torch.ldexp(1 + mantissa, exponent - codec.bias)
    subnormal = torch.ldexp(mantissa, torch.tensor(1 - codec.bias, device=device))
    value = torch.where(exponent > 0, normal, subnormal)
    value = torch.where((code & 0x7F) > codec.max_code, torch.nan, value)
    return torch.where(code >= 0x80, -value, value)


def _round_to_code(magnitude: Tensor, codec: Codec) -> Tensor:
    """int64 code of the nearest FP8 value to `magnitude` >= 0, ties to even, saturating."""
    magnitude = magnitude.clamp(max=codec.max)
    # the unit in the last place at this magnitude; rounding in units of it is rounding to the format
    exponent = (torch.frexp(magnitude).exponent - 1).clamp(min=1 - codec.bias)
    exponent = torch.where(magnitude > 0, exponent, 1 - codec.bias)
    units = torch.round(torch.ldexp(magnitude, codec.mantissa_bits - exponent)).to(torch.int64)
    return units + ((exponent + codec.bias - 1).to(torch.int64) << codec.mantissa_bits)


def encode_group(
    x: Tensor,
    codec: Codec,
    group_size: int,
    *,
    signed: bool = True,
    rounding: str = "nearest",
    key: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, amax and k16 of `x`.

    Args:
        x: any shape, read as float32 in row-major order.
        codec: a quantized codec.
        group_size: elements a group.
        signed: whether the values are signed; unsigned ones never flush to zero, whatever the codec.
        rounding: "nearest" or "stochastic".
        key: the generator's key for stochastic rounding (`formats.random.stream_key`).
        dtype: float32, or float64 for exact logarithms.

    Returns:
        codes uint8 of x's shape, amax float32 [n_groups], k16 uint8 [n_groups].
    """
    x32 = x.to(torch.float32)
    amax, k16 = group_metadata(x32, codec, group_size)
    grouped = _groups(x32, group_size)
    finite = torch.isfinite(grouped)
    magnitude = torch.where(finite, grouped.abs(), 0).to(dtype)
    top, meta = amax.to(dtype)[:, None], k16.to(dtype)[:, None]
    dither = None
    if rounding == "stochastic":
        dither = _groups(uniform8(key, x.numel(), x.device), group_size)

    if codec.name == "log8":
        codes = _encode_log8(magnitude, top, meta, dither)
        codes = torch.where(finite & (grouped > 0), codes, 0)
    else:
        if codec.expand:
            y = meta / 16 * (torch.log2(magnitude) - torch.log2(top)) + math.log2(codec.max)
            codes = _round_to_code(torch.exp2(torch.where(magnitude > 0, y, -torch.inf)), codec)
        else:
            scale = amax[:, None] / torch.full_like(amax, codec.max)[:, None]
            quotient = torch.where(finite, grouped.abs(), 0) / torch.where(scale > 0, scale, 1)
            codes = _round_to_code(quotient, codec)
            codes = torch.where((scale == 0) & (magnitude > 0), 1, codes)
        keep = codec.expand or not signed
        if dither is not None:
            codes = _dither_float8(codes, magnitude, amax, k16, codec, dither)
        if keep:
            codes = torch.where(magnitude > 0, codes.clamp(min=1), codes)
        negative = (grouped < 0) & (codes > 0)
        codes = torch.where(finite, codes | torch.where(negative, 0x80, 0), NAN_CODE)
    flat = codes.to(torch.uint8).reshape(-1)[: x.numel()]
    return flat.view(x.shape), amax, k16


def _encode_log8(magnitude: Tensor, amax: Tensor, j: Tensor, dither: Tensor | None) -> Tensor:
    y = 255 - 250 * (torch.log2(amax) - torch.log2(magnitude)) / j
    y = torch.where(magnitude > 0, y, 0)
    if dither is None:
        return torch.round(y).clamp(1, 255).to(torch.int64)
    code = torch.floor(y)
    f = y - code
    half = 1 / (1 + torch.exp2(j / 500))
    probability = f - 4 * (0.5 - half) * f * (1 - f)
    return (code + (dither < probability)).clamp(1, 255).to(torch.int64)


def _dither_float8(codes: Tensor, magnitude: Tensor, amax: Tensor, k16: Tensor, codec: Codec, dither: Tensor) -> Tensor:
    """Stochastic rounding in the linear domain, from the nearest codes."""

    def decoded(code: Tensor) -> Tensor:
        return _decode_groups(code, amax, k16, codec, magnitude.dtype)

    below = torch.where(decoded(codes) > magnitude, codes - 1, codes).clamp(min=0)
    above = (below + 1).clamp(max=codec.max_code)
    low, high = decoded(below), decoded(above)
    probability = torch.where(high > low, (magnitude - low) / (high - low), 0)
    return torch.where(dither < probability, above, below)


def _decode_groups(codes: Tensor, amax: Tensor, k16: Tensor, codec: Codec, dtype: torch.dtype) -> Tensor:
    """Values of integer codes [n_groups, group_size]."""
    top, meta = amax.to(dtype)[:, None], k16.to(dtype)[:, None]
    if codec.name == "log8":
        half = torch.exp2((codes.to(dtype) - 255) * meta / 500)
        return torch.where(codes > 0, (top * half) * half, 0)
    value = code_values(codec, dtype, codes.device)[codes.to(torch.int64)]
    if not codec.expand:
        scale = amax / torch.full_like(amax, codec.max)
        return value * scale.to(dtype)[:, None]
    half = torch.exp2(torch.log2(value.abs() / codec.max) * 8 / meta)
    decoded = (top * half) * half
    return torch.where(value == 0, 0, torch.copysign(decoded, value))


def decode_group(codes: Tensor, amax: Tensor, k16: Tensor, codec: Codec, group_size: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of `codes` (uint8, any shape) as `dtype`; inverse of `encode_group`."""
    grouped = _groups(codes, group_size)
    return _decode_groups(grouped, amax, k16, codec, dtype).reshape(-1)[: codes.numel()].view(codes.shape)
