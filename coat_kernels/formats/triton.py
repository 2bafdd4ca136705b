"""Encode and decode of every codec as Triton device functions: README.md, for kernels on a GPU.

Tensors are [rows, G], one group a row; per-group values are [rows]. There are two ways through. The *checked* functions take any
input. The *plain* ones are for `e4m3_expand`, `e5m2_expand` and `log8` on a hot path, and cost about half as much. They work on
x · 2^-e with a power of two of the group's own, near its amax: that keeps logarithms small, hence exact, and saves the product
with amax. They serve groups whose `irregular` is negative: no NaN or inf, no subnormal, no range too wide.
`ISA` chooses between PTX and portable operations (`triton_ptx.py`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl

from .codecs import CODECS, LOG2_SLACK_Q11, MAX_OCTAVES
from .triton_params import uniform8, words
from .triton_ptx import (
    MAGIC,
    MAGIC_BITS,
    PORTABLE,
    PTX_FP8,
    bits_of,
    divide,
    e4m3_power,
    exp2,
    float_of,
    log2,
    pack_bytes,
    pack_dithered,
    pack_float8,
    reciprocal,
    small_int_to_float,
    steps_below_top,
)

LOG8, SOFTSIGN8 = tl.constexpr(CODECS["log8"].index), tl.constexpr(CODECS["softsign8"].index)
INF_BITS = tl.constexpr(0x7F800000)
#: `log8`: 250 steps an octave and j; 254 steps fill a group's range.
LOG8_STEPS = tl.constexpr(250)
_LOG8_STEP = tl.constexpr(float(np.float32(1 / 250)))
_LOG8_STEP_REST = tl.constexpr(1 / 250 - float(np.float32(1 / 250)))
_LOG8_UNIT = tl.constexpr(254 * 2048)
_LOG8_ROUND_UP = tl.constexpr(250 * LOG2_SLACK_Q11 + 254 * 2048 - 1)
_OCTAVE_CUT = tl.constexpr(MAX_OCTAVES)
#: Units of the plain forms. Of a squared moment, an addend that is normal must not vanish in its unit.
_MIN_UNIT_BITS, _MAX_UNIT_BITS, _MAX_SQUARED_UNIT_BITS = (
    tl.constexpr(3 << 23),
    tl.constexpr((127 + 86) << 23),
    tl.constexpr((127 + 22) << 23),
)
#: New values from here on, in the old values' unit: products with the unit would leave float32.
_MAX_GROWTH, _MAX_SQUARED_GROWTH = tl.constexpr((127 + 40) << 23), tl.constexpr((127 + 58) << 23)
#: `log8` over 40 octaves: a float32 exponent cannot hold it to 4e-6.
_LOG8_WIDE = tl.constexpr(40)
_OCTAVE_CUT_Q15 = tl.constexpr(float(MAX_OCTAVES << 15))

_TL_DTYPES = {torch.uint8: tl.uint8, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
_BY_INDEX = sorted(CODECS.values(), key=lambda codec: codec.index)


@triton.constexpr_function
def codec_constant(codec, name):
    """A field of `codecs.Codec`, by codec number."""
    return getattr(_BY_INDEX[codec], name)


@triton.constexpr_function
def log2_of(x):
    return math.log2(x)


@triton.constexpr_function
def has_plain_form(codec):
    return _BY_INDEX[codec].expand or _BY_INDEX[codec].name == "log8"


@triton.constexpr_function
def is_dithered_in_tiles(codec):
    """Whether rounding by chance costs few enough registers for 16 elements a thread; small floats decode two neighbours for it."""
    return not _BY_INDEX[codec].is_float


@triton.constexpr_function
def array_dtype(codec):
    """Triton's `Codec.array_dtype`."""
    return _TL_DTYPES[_BY_INDEX[codec].array_dtype]


# --- storage


@triton.jit
def code_offset(first, CODEC: tl.constexpr):
    """Of the code or value of element `first`, an even number, in its array."""
    return first // 2 if codec_constant(CODEC, "bits") == 4 else first


@triton.jit
def load_codes(ptr, left, G: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, CODEC: tl.constexpr):
    """Codes or values [ROWS, G] at `ptr`, where the first one lies; with MASKED zeros from the `left`-th element on."""
    other = 0 if MASKED else None
    if codec_constant(CODEC, "bits") == 4:
        offsets = tl.arange(0, ROWS)[:, None] * (G // 2) + tl.arange(0, G // 2)[None, :]
        pairs = tl.load(ptr + offsets, mask=2 * offsets < left if MASKED else None, other=other)
        return tl.interleave(pairs & 15, pairs >> 4)
    else:
        offsets = tl.arange(0, ROWS)[:, None] * G + tl.arange(0, G)[None, :]
        return tl.load(ptr + offsets, mask=offsets < left if MASKED else None, other=other)


@triton.jit
def store_codes(ptr, codes, left, G: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, CODEC: tl.constexpr):
    """Inverse of `load_codes`. The code behind an odd last one is that of 0, as padding is."""
    if codec_constant(CODEC, "bits") == 4:
        offsets = tl.arange(0, ROWS)[:, None] * (G // 2) + tl.arange(0, G // 2)[None, :]
        low, high = tl.split(tl.reshape(codes, [ROWS, G // 2, 2]))
        tl.store(ptr + offsets, low | (high << 4), mask=2 * offsets < left if MASKED else None)
    else:
        offsets = tl.arange(0, ROWS)[:, None] * G + tl.arange(0, G)[None, :]
        tl.store(ptr + offsets, codes, mask=offsets < left if MASKED else None)


# --- metadata


@triton.jit
def _group_range(x):
    """Pattern of the largest finite magnitude and the range D of each group of any float32 x."""
    bits = bits_of(x) & 0x7FFFFFFF
    bits = tl.where(bits < INF_BITS, bits, 0)
    max_bits = tl.max(bits, axis=1)
    min_bits = tl.min(tl.where(bits > 0, bits, INF_BITS), axis=1)
    return max_bits, tl.maximum(max_bits - min_bits, 0)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def plain_range(x, unit, CODEC: tl.constexpr, SIGNED: tl.constexpr, ISA: tl.constexpr):
    """Pattern of the largest |x| of each group, D, amax = that times `unit`, and `irregular`, which is true of NaN and inf.

    x is float32 [rows, G], divided by `unit` [rows]. A non-negative `irregular` sends the group through the checked functions.
    D of a group of zeros is negative.
    """
    if ISA == PORTABLE:
        max_bits = tl.max(bits_of(x) & 0x7FFFFFFF, axis=1)
    else:
        max_bits = bits_of(tl.reduce(tl.abs(x), 1, _larger_or_nan))
    # 2·bits - 1 drops the sign and puts zeros last among unsigned numbers: two instructions an element
    key = tl.min((x.to(tl.uint32, bitcast=True) << 1) - 1, axis=1)
    below_min = (key >> 1).to(tl.int32, bitcast=True)  # pattern of the smallest non-zero magnitude, less 1
    spread = max_bits - below_min - 1
    CUT: tl.constexpr = _LOG8_WIDE if CODEC == LOG8 else _OCTAVE_CUT
    irregular = tl.maximum(max_bits - (_MAX_GROWTH if SIGNED else _MAX_SQUARED_GROWTH), (spread >> 1) - (CUT << 22))
    irregular = tl.maximum(irregular, 0x007FFFFE - below_min)  # subnormal: the logarithm unit takes it for zero
    return max_bits, spread, float_of(max_bits) * unit, irregular


@triton.jit
def sqrt_of_unit(unit):
    """Exact square root of `decode_plain`'s unit."""
    return float_of((bits_of(unit) >> 1) + (127 << 22))


@triton.jit
def inverse_of_unit(unit):
    """Exact reciprocal of `decode_plain`'s unit."""
    return float_of((254 << 23) - bits_of(unit))


@triton.jit
def expansion_k16(spread, max_bits, CODEC: tl.constexpr, ISA: tl.constexpr):
    """16·k as a float32 integer: the exact floor of range_q15 / (D >> 8).

    The quotient by an approximate reciprocal rounds to the floor or one above; the sign of the exact remainder tells which.
    """
    NUMERATOR: tl.constexpr = 1.0 * codec_constant(CODEC, "range_q15")
    octaves = tl.minimum(small_int_to_float((spread.to(tl.uint32, bitcast=True) >> 8).to(tl.int32, bitcast=True)), _OCTAVE_CUT_Q15)
    rounded = tl.minimum(NUMERATOR * reciprocal(octaves, ISA), 255.0) + MAGIC
    remainder = NUMERATOR - (rounded - MAGIC) * octaves  # under 2^24: exact, fused or not
    k16_bits = bits_of(rounded) + (bits_of(remainder) >> 31)
    return float_of(tl.where(max_bits == 0, MAGIC_BITS + 16, k16_bits)) - MAGIC


@triton.jit
def log8_j(spread):
    """j as int32; at least 1 and at most 252 by the bounds of D."""
    return ((tl.maximum(spread, 0) >> 12) * LOG8_STEPS + _LOG8_ROUND_UP) // _LOG8_UNIT


@triton.jit
def _metadata(spread, max_bits, CODEC: tl.constexpr, ISA: tl.constexpr):
    """The stored byte as a float32 integer."""
    if CODEC == LOG8:
        return small_int_to_float(log8_j(spread))
    elif codec_constant(CODEC, "expand"):
        return expansion_k16(spread, max_bits, CODEC, ISA)
    else:
        return small_int_to_float(max_bits * 0 + 16)


# --- decode


@triton.jit
def _inverse(k, ISA: tl.constexpr):
    """1/k with a Newton step: the last bit of the unit's counts up to 36 times in an exponent."""
    inverse = reciprocal(k, ISA)
    return inverse + inverse * (1.0 - k * inverse)


@triton.jit
def _times_power(amax, power, n):
    """amax · power · 2^-n for 0 <= n < 512 and amax · power · 2^-n <= amax, rounded once (twice below 2^-100 · amax)."""
    first = tl.minimum(n, 100)
    x = amax * (power * float_of((127 - first) << 23))
    second = tl.minimum(n - first, 126)
    return x * float_of((127 - second) << 23) * float_of((127 - tl.minimum(n - first - second, 126)) << 23)


@triton.jit
def decode_checked(codes, amax, k16, CODEC: tl.constexpr, ISA: tl.constexpr):
    """float32 values of integer `codes` [rows, G] for any metadata: amax float32 and k16 int32 [rows]."""
    codes = codes.to(tl.int32)
    if CODEC == LOG8:
        return _decode_log8(codes, amax, k16, ISA)
    elif CODEC == SOFTSIGN8:
        return _decode_softsign8(codes, amax, ISA)
    else:
        return _decode_float(codes, amax, k16, CODEC, ISA)


@triton.jit
def _decode_log8(codes, amax, j, ISA: tl.constexpr):
    steps = (255 - codes) * j[:, None]
    octaves = steps // LOG8_STEPS
    power = exp2((steps - octaves * LOG8_STEPS).to(tl.float32) * (-1.0 / LOG8_STEPS), ISA)
    return tl.where(codes > 0, _times_power(amax[:, None], power, octaves), 0.0)


@triton.jit
def _decode_softsign8(codes, amax, ISA: tl.constexpr):
    number = ((codes ^ 0x80) - 0x80).to(tl.float32)
    return divide(number, 254.0 - tl.abs(number), ISA) * amax[:, None]


@triton.jit
def code_value(magnitude, CODEC: tl.constexpr):
    """The number that a small float's code without its sign stands for; NaN codes give infinity."""
    M: tl.constexpr = codec_constant(CODEC, "mantissa_bits")
    # the code's bits at the top of a float32: the product moves the exponent's bias and normalises subnormals
    value = float_of(magnitude << (23 - M)) * 2.0 ** (127 - codec_constant(CODEC, "bias"))
    return tl.where(magnitude > codec_constant(CODEC, "max_code"), float("inf"), value)


@triton.jit
def _decode_float(codes, amax, k16, CODEC: tl.constexpr, ISA: tl.constexpr):
    M: tl.constexpr = codec_constant(CODEC, "mantissa_bits")
    BIAS: tl.constexpr = codec_constant(CODEC, "bias")
    MAX: tl.constexpr = codec_constant(CODEC, "max")
    SIGN: tl.constexpr = codec_constant(CODEC, "sign_bit")
    magnitude = codes & (SIGN - 1)
    value = code_value(magnitude, CODEC)
    if codec_constant(CODEC, "expand"):
        # log2(q / max) as an integer e <= 0 and a fraction: the integer is divided by k exactly
        TOP: tl.constexpr = codec_constant(CODEC, "max_code") >> M
        bits = bits_of(value)
        fraction = log2(float_of((bits & 0x7FFFFF) | 0x3F800000) * (2.0 ** (TOP - BIAS) / MAX), ISA)
        k16 = small_int_to_float(k16)[:, None]
        inverse = _inverse(k16, ISA)
        sixteenths = small_int_to_float(tl.maximum((127 + TOP - BIAS) - (bits >> 23), 0) * 16)
        rounded = sixteenths * inverse + MAGIC
        rest = sixteenths - (rounded - MAGIC) * k16
        power = exp2(fraction * (16 * inverse) - rest * inverse, ISA)
        value = tl.where(magnitude == 0, 0.0, _times_power(amax[:, None], power, bits_of(rounded) - MAGIC_BITS))
    else:
        value = value * (amax / MAX)[:, None]
    value = tl.where(magnitude > codec_constant(CODEC, "max_code"), float("nan"), value)
    return tl.where(codes >= SIGN, -value, value)


@triton.jit
def decode_plain(codes, amax, k16, CODEC: tl.constexpr, SIGNED: tl.constexpr, ISA: tl.constexpr):
    """Values / unit [rows, G], the `unit` [rows], and `irregular` [rows].

    `unit` is 2^e with the even e nearest below amax's exponent or next to it, 1 for a group of zeros. Scaling `amax` scales the
    values. NaN codes give infinities or NaN.
    """
    unit_bits = tl.maximum((bits_of(amax) & 0x7F000000) | 0x00800000, _MIN_UNIT_BITS)
    unit = float_of(tl.where(amax == 0, 127 << 23, unit_bits))
    amax = amax * inverse_of_unit(unit)
    # NaN codes of a group of zeros must outweigh this
    log_amax = tl.maximum(log2(amax, ISA), -1000.0)[:, None]
    irregular = unit_bits - (_MAX_UNIT_BITS if SIGNED else _MAX_SQUARED_UNIT_BITS)
    if CODEC == LOG8:
        if ISA == PORTABLE:
            steps = tl.where(codes == 0, -3e7, codes.to(tl.float32) - 255.0)
        else:
            steps = steps_below_top(codes)
        j = small_int_to_float(k16)
        octaves_a_step = j * _LOG8_STEP + j * _LOG8_STEP_REST
        values = exp2(steps * octaves_a_step[:, None] + log_amax, ISA)
        irregular = tl.maximum(irregular, k16 - (_LOG8_WIDE + 1))
    elif ISA == PTX_FP8 and codec_constant(CODEC, "mantissa_bits") == 3:
        inverse_k = _inverse(small_int_to_float(k16) * (1.0 / 16), ISA)[:, None]
        values = e4m3_power(codes, tl.broadcast_to(inverse_k, codes.shape), tl.broadcast_to(log_amax, codes.shape), SIGNED)
    else:
        values = decode_checked(codes, amax, k16, CODEC, ISA)
    return values, unit, irregular


# --- encode


@triton.jit
def round_to_code(magnitude, CODEC: tl.constexpr):
    """int32 code of the small float nearest to `magnitude` >= 0, ties to even, saturating; integer arithmetic, bit-exact everywhere."""
    M: tl.constexpr = codec_constant(CODEC, "mantissa_bits")
    BIAS: tl.constexpr = codec_constant(CODEC, "bias")
    magnitude = tl.minimum(magnitude, 1.0 * codec_constant(CODEC, "max"))
    bits = bits_of(magnitude)
    normal = ((bits + ((1 << (22 - M)) - 1) + ((bits >> (23 - M)) & 1)) >> (23 - M)) - ((127 - BIAS) << M)
    # adding 2^23 smallest steps leaves the count of steps, rounded to even, in the low bits
    subnormal = bits_of(magnitude + MAGIC * codec_constant(CODEC, "min_subnormal")) & 0xFF
    return tl.where(bits < ((128 - BIAS) << 23), subnormal, normal)


@triton.jit
def encode_plain(
    x, max_bits, spread, key, first, offsets, CODEC: tl.constexpr, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, ISA: tl.constexpr
):
    """uint8 codes of plain groups and the metadata byte as int32 [rows]. Small floats are rounded to nearest."""
    metadata = _metadata(spread, max_bits, CODEC, ISA)
    # a group of zeros has no logarithm: any finite one keeps its elements at log2(0) = -inf
    top = tl.maximum(log2(float_of(max_bits), ISA), -149.0)
    if CODEC == LOG8:
        slope = reciprocal(metadata, ISA) * LOG8_STEPS
        y = log2(x, ISA) * slope[:, None] + (255.0 - slope * top)[:, None]
        if STOCHASTIC:
            curve = tl.broadcast_to(_curve(metadata, ISA)[:, None], x.shape)
            if ISA == PORTABLE:
                codes = _dithered(tl.maximum(y, 0.0), curve, uniform8(key, first, offsets)).to(tl.uint8)
            else:
                codes = pack_dithered(y, curve, words(key, (first >> 2) + (offsets >> 2)))
        elif ISA == PORTABLE:
            codes = bits_of(tl.maximum(y, 0.0) + MAGIC).to(tl.uint8)
        else:
            codes = pack_bytes(y)
    else:
        k = metadata * (1.0 / 16)
        y = log2(tl.abs(x), ISA) * k[:, None] + (log2_of(codec_constant(CODEC, "max")) - k * top)[:, None]
        if ISA == PTX_FP8 and codec_constant(CODEC, "bits") == 8:
            codes = pack_float8(exp2(y, ISA), x if SIGNED else tl.abs(x), codec_constant(CODEC, "mantissa_bits"))
        else:
            signs = tl.where(bits_of(x) < 0, codec_constant(CODEC, "sign_bit"), 0)
            codes = (round_to_code(exp2(y, ISA), CODEC) | signs).to(tl.uint8)
    return codes, bits_of(metadata + MAGIC) & 0xFF


@triton.jit
def _curve(j, ISA: tl.constexpr):
    """4·(1/2 - h), h = 1 / (1 + 2^(j/500)), of float32 j [rows]."""
    return 2.0 - 4.0 * reciprocal(1.0 + exp2(j * (0.5 / LOG8_STEPS), ISA), ISA)


@triton.jit
def _dithered(y, curve, u):
    below = tl.floor(y)
    f = y - below
    return (below + tl.where(u < f - curve * f * (1 - f), 1.0, 0.0)).to(tl.int32)


@triton.jit
def _dithered_float(code, magnitude, amax, k16, u, CODEC: tl.constexpr, ISA: tl.constexpr):
    """Codes rounded up or down by chance in the linear domain, from the nearest."""
    nearest = decode_checked(code, amax, k16, CODEC, ISA)
    is_above = nearest > magnitude
    below = tl.maximum(code - is_above.to(tl.int32), 0)
    above = tl.minimum(below + 1, codec_constant(CODEC, "max_code"))
    other = decode_checked(tl.where(is_above, below, above), amax, k16, CODEC, ISA)
    low, step = tl.minimum(nearest, other), tl.abs(nearest - other)
    probability = tl.where(step > 0, (magnitude - low) / tl.where(step > 0, step, 1.0), 0.0)
    return tl.where(u < probability, above, below)


@triton.jit
def encode_checked(x, key, first, offsets, CODEC: tl.constexpr, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, ISA: tl.constexpr):
    """Codes uint8 [rows, G], amax float32 [rows] and the metadata byte as int32 [rows] of any float32 x.

    `key`, `first` (element number of the tile's start, a multiple of 4) and `offsets` feed the generator and count in STOCHASTIC only.
    Padding must be zeros: they count for nothing.
    """
    max_bits, spread = _group_range(x)
    amax = float_of(max_bits)
    metadata = _metadata(spread, max_bits, CODEC, ISA)
    finite = (bits_of(x) & 0x7FFFFFFF) < INF_BITS
    magnitude = tl.where(finite, tl.abs(x), 0.0)
    u = magnitude
    if STOCHASTIC:
        u = uniform8(key, first, offsets)
    if CODEC == LOG8:
        codes = _encode_log8(magnitude, amax, metadata, u, STOCHASTIC, ISA)
        codes = tl.where(finite & (x > 0), codes, 0)
    elif CODEC == SOFTSIGN8:
        codes = _encode_softsign8(magnitude, amax, u, SIGNED, STOCHASTIC, ISA)
        codes = tl.where(x < 0, -codes, codes) & 0xFF
    else:
        codes = _encode_float(magnitude, amax, metadata, u, CODEC, SIGNED, STOCHASTIC, ISA)
        codes |= tl.where((x < 0) & (codes > 0), codec_constant(CODEC, "sign_bit"), 0)
        codes = tl.where(finite, codes, codec_constant(CODEC, "nan_code"))
    return codes.to(tl.uint8), amax, bits_of(metadata + MAGIC) & 0xFF


@triton.jit
def _log2_below_top(magnitude, amax, ISA: tl.constexpr):
    """log2(magnitude / amax); for zeros a number under any code's."""
    # groups under 2^-63 are lifted by 2^80, out of the subnormals that the logarithm unit flushes
    lift = tl.where(amax < 2.0**-63, 2.0**80, 1.0)
    top = tl.maximum(log2(amax * lift, ISA), -149.0)
    return tl.maximum(log2(magnitude * lift[:, None], ISA) - top[:, None], -300.0)


@triton.jit
def _encode_log8(magnitude, amax, metadata, u, STOCHASTIC: tl.constexpr, ISA: tl.constexpr):
    slope = reciprocal(metadata, ISA) * LOG8_STEPS
    y = tl.minimum(tl.maximum(255.0 + _log2_below_top(magnitude, amax, ISA) * slope[:, None], 1.0), 255.0)
    if STOCHASTIC:
        return _dithered(y, _curve(metadata, ISA)[:, None], u)
    else:
        return bits_of(y + MAGIC) & 0xFF


@triton.jit
def _encode_softsign8(magnitude, amax, u, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, ISA: tl.constexpr):
    """int32 codes without their sign."""
    # the reciprocal unit flushes subnormals: groups are brought near 1; one of zeros needs a finite quotient
    lift = tl.where(amax < 2.0**-63, 2.0**80, tl.where(amax > 2.0**63, 2.0**-80, 1.0))
    lifted = magnitude * lift[:, None]
    top = tl.maximum(amax * lift, 2.0**-100)
    total = lifted + top[:, None]
    y = divide(254.0 * lifted, total, ISA)
    if STOCHASTIC:
        below = tl.floor(y)
        odds = (y - below) * (253.0 - below) * total * reciprocal(254.0 * top, ISA)[:, None]
        codes = (below + tl.where(u < odds, 1.0, 0.0)).to(tl.int32)
    else:
        codes = bits_of(y + MAGIC) & 0xFF
    return codes if SIGNED else tl.maximum(codes, (magnitude > 0).to(tl.int32))


@triton.jit
def _encode_float(magnitude, amax, metadata, u, CODEC: tl.constexpr, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, ISA: tl.constexpr):
    if codec_constant(CODEC, "expand"):
        y = _log2_below_top(magnitude, amax, ISA) * (metadata * (1.0 / 16))[:, None] + log2_of(codec_constant(CODEC, "max"))
        codes = round_to_code(exp2(y, ISA), CODEC)
    else:
        scale = amax / codec_constant(CODEC, "max")
        quotient = magnitude / tl.where(scale > 0, scale, 1.0)[:, None]
        codes = tl.where((scale == 0)[:, None], 1, round_to_code(quotient, CODEC))
    codes = tl.where(magnitude > 0, codes, 0)
    if STOCHASTIC:
        codes = _dithered_float(codes, magnitude, amax, bits_of(metadata + MAGIC) & 0xFF, u, CODEC, ISA)
    if codec_constant(CODEC, "expand") or not SIGNED:
        codes = tl.maximum(codes, (magnitude > 0).to(tl.int32))
    return codes
