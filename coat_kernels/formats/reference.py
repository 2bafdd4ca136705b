"""Encode and decode of every codec in plain PyTorch: the executable form of README.md.

Pure functions of their arguments, on any device, in float32 or (``dtype=torch.float64``) with exact logarithms.
Tests hold every kernel against these; where no kernel can be built they serve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .codecs import LOG2_SLACK_Q11, MAX_OCTAVES, Codec, num_groups
from .parameters import round_stochastic
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


def pack_codes(codes: Tensor, codec: Codec) -> Tensor:
    """Codes of single elements (integers, any shape) as stored: uint8 of `codec.codes_shape`."""
    if codec.bits == 8:
        return codes.to(torch.uint8)
    flat = codes.reshape(-1).to(torch.uint8)
    nibbles = flat.new_zeros(2 * num_groups(flat.numel(), 2))
    nibbles[: flat.numel()] = flat
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_codes(stored: Tensor, codec: Codec, shape: Sequence[int] | None = None) -> Tensor:
    """uint8 codes of single elements; inverse of `pack_codes`.

    Args:
        stored: uint8 of `codec.codes_shape(shape)`.
        shape: of the tensor; None: that of `stored`, or flat with an even count of elements where codes share bytes.
    """
    if codec.bits == 4:
        stored = torch.stack([stored.reshape(-1) & 15, stored.reshape(-1) >> 4], dim=1).view(-1)
    return stored if shape is None else stored[: math.prod(shape)].view(shape) if codec.bits == 4 else stored.view(shape)


def code_values(codec: Codec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """[2^bits] the number each code of a small float stands for (NaN and inf codes included)."""
    code = torch.arange(1 << codec.bits, device=device)
    magnitude = code & (codec.sign_bit - 1)
    mantissa = (code & ((1 << codec.mantissa_bits) - 1)).to(dtype) / (1 << codec.mantissa_bits)
    exponent = magnitude >> codec.mantissa_bits
    normal = torch.ldexp(1 + mantissa, exponent - codec.bias)
    subnormal = torch.ldexp(mantissa, torch.tensor(1 - codec.bias, device=device))
    value = torch.where(exponent > 0, normal, subnormal)
    value = torch.where(magnitude > codec.max_code, torch.nan, value)
    return torch.where(code >= codec.sign_bit, -value, value)


def round_to_code(magnitude: Tensor, codec: Codec) -> Tensor:
    """int64 code of the nearest value to `magnitude` >= 0, ties to even, saturating."""
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
        codes uint8 of `codec.codes_shape(x.shape)`, amax float32 [n_groups], k16 uint8 [n_groups].
    """
    x32 = x.to(torch.float32)
    amax, k16 = group_metadata(x32, codec, group_size)
    grouped = _groups(x32, group_size)
    finite = torch.isfinite(grouped)
    magnitude = torch.where(finite, grouped.abs(), 0).to(dtype)
    dither = None
    if rounding == "stochastic":
        dither = _groups(uniform8(key, x.numel(), x.device), group_size)

    if codec.name == "log8":
        codes = _encode_log8(magnitude, amax.to(dtype)[:, None], k16.to(dtype)[:, None], dither)
        codes = torch.where(finite & (grouped > 0), codes, 0)
    elif codec.name == "softsign8":
        codes = _encode_softsign8(magnitude.to(torch.float64), amax.to(torch.float64)[:, None], dither)
        codes = torch.where((magnitude > 0) & (not signed), codes.clamp(min=1), codes)
        codes = torch.where(grouped < 0, -codes, codes) & 0xFF
    else:
        codes = _encode_float(magnitude, amax, k16, codec, dither)
        if codec.expand or not signed:
            codes = torch.where(magnitude > 0, codes.clamp(min=1), codes)
        negative = (grouped < 0) & (codes > 0)
        codes = codes | torch.where(negative, codec.sign_bit, 0)
    codes = torch.where(finite, codes, codec.nan_code)
    return pack_codes(codes.reshape(-1)[: x.numel()].view(x.shape), codec), amax, k16


def round_bfloat16(x: Tensor, rounding: str = "nearest", key: int = 0) -> Tensor:
    """What the `bfloat16` codec stores of float32 `x`: finite values stay finite. Arguments as in `encode_group`."""
    largest = torch.finfo(torch.bfloat16).max
    held = torch.where(torch.isfinite(x), x.clamp(-largest, largest), x)
    return round_stochastic(held, torch.bfloat16, key) if rounding == "stochastic" else held.to(torch.bfloat16)


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


def _encode_softsign8(magnitude: Tensor, amax: Tensor, dither: Tensor | None) -> Tensor:
    """Magnitudes of the codes. float64: values with few mantissa bits lie halfway between codes, and only an exact sum shows it."""
    top = torch.where(amax > 0, amax, 1)
    y = 254 * magnitude / (top + magnitude)
    if dither is None:
        return torch.round(y).to(torch.int64)
    code = torch.floor(y)
    probability = (y - code) * (253 - code) * (1 + magnitude / top) / 254
    return (code + (dither < probability)).to(torch.int64)


def _encode_float(magnitude: Tensor, amax: Tensor, k16: Tensor, codec: Codec, dither: Tensor | None) -> Tensor:
    """Codes of small floats without their sign."""
    if codec.expand:
        ratio = torch.log2(magnitude) - torch.log2(amax.to(magnitude.dtype))[:, None]
        y = k16.to(magnitude.dtype)[:, None] / 16 * ratio + math.log2(codec.max)
        codes = round_to_code(torch.exp2(torch.where(magnitude > 0, y, -torch.inf)), codec)
    else:
        scale = amax[:, None] / torch.full_like(amax, codec.max)[:, None]
        quotient = magnitude.to(torch.float32) / torch.where(scale > 0, scale, 1)
        codes = round_to_code(quotient, codec)
        codes = torch.where((scale == 0) & (magnitude > 0), 1, codes)
    return codes if dither is None else _dither_float(codes, magnitude, amax, k16, codec, dither)


def _dither_float(codes: Tensor, magnitude: Tensor, amax: Tensor, k16: Tensor, codec: Codec, dither: Tensor) -> Tensor:
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
    if codec.name == "softsign8":
        number = torch.where(codes >= 128, codes.to(dtype) - 256, codes.to(dtype))
        return number / (254 - number.abs()) * top
    value = code_values(codec, dtype, codes.device)[codes.to(torch.int64)]
    if not codec.expand:
        scale = amax / torch.full_like(amax, codec.max)
        return value * scale.to(dtype)[:, None]
    half = torch.exp2(torch.log2(value.abs() / codec.max) * 8 / meta)
    decoded = (top * half) * half
    return torch.where(value == 0, 0, torch.copysign(decoded, value))


def decode_group(
    codes: Tensor,
    amax: Tensor,
    k16: Tensor,
    codec: Codec,
    group_size: int,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values of `codes` as `dtype`; inverse of `encode_group`.

    Args:
        codes: uint8 of `codec.codes_shape(shape)`.
        shape: of the tensor; None: that of `codes`, or flat with an even count of elements where codes share bytes.
    """
    elements = unpack_codes(codes, codec, shape)
    values = _decode_groups(_groups(elements, group_size), amax, k16, codec, dtype)
    return values.reshape(-1)[: elements.numel()].view(elements.shape)
