"""The generator of stochastic rounding and the storage of parameters, as Triton device functions: README.md's last two sections."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_ptx import PORTABLE, bits_of, float_of

PARAM_NEAREST, PARAM_STOCHASTIC, PARAM_SPLIT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
#: Pattern of the largest finite bfloat16 as a float32.
_BFLOAT16_MAX = tl.constexpr(0x7F7F0000)


@triton.jit
def mix(h):
    """MurmurHash3's finalizer on uint32."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def stream_key(seed, step, tensor_index, STREAM: tl.constexpr):
    """uint32 key; the arguments are taken modulo 2^32."""
    h = mix(mix(seed.to(tl.uint32)) + step.to(tl.uint32))
    return mix(h + tensor_index.to(tl.uint32) * 4 + STREAM)


@triton.jit
def words(key, counter):
    """uint32 word of each `counter`; equal counters of neighbours compile to one hash."""
    return mix(key + counter.to(tl.uint32) * 0x9E3779B9)


@triton.jit
def uniform8(key, first, offsets):
    """float32 in (0, 1), of 256 values, for the elements `first + offsets`; `first` is a multiple of 4."""
    word = words(key, (first >> 2) + (offsets >> 2))
    byte = (word >> ((offsets & 3) * 8).to(tl.uint32)) & 0xFF
    return (byte.to(tl.float32) + 0.5) / 256


@triton.jit
def _half_words(key, first, offsets):
    """int32 in 0 .. 65535 for the elements `first + offsets`; `first` is even."""
    word = words(key, (first >> 1) + (offsets >> 1))
    return ((word >> ((offsets & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def to_float32(x):
    """Exact, NaN and subnormals included (the interpreter's conversion of bfloat16 subnormals is not)."""
    if x.dtype == tl.bfloat16:
        return float_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def load_param(stored, residual, ROUNDING: tl.constexpr):
    """float32 value of a stored parameter; `residual` int8 counts in `PARAM_SPLIT` only."""
    if ROUNDING == PARAM_SPLIT:
        high = stored.to(tl.int16, bitcast=True).to(tl.int32)
        return float_of((high << 16) + (residual.to(tl.int32) << 8))
    else:
        return to_float32(stored)


@triton.jit
def to_dtype(x, DTYPE: tl.constexpr, ISA: tl.constexpr):
    """`x` rounded to nearest even in DTYPE; the interpreter's own conversion to bfloat16 truncates."""
    if DTYPE == tl.bfloat16 and ISA == PORTABLE:
        bits = bits_of(x)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = tl.where(is_nan, 0x7FC00000, bits) + tl.where(is_nan, 0, 0x7FFF + ((bits >> 16) & 1))
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def store_param(x, key, first, offsets, DTYPE: tl.constexpr, ROUNDING: tl.constexpr, ISA: tl.constexpr):
    """A parameter as stored, and its int8 residual (meaningless unless `PARAM_SPLIT`)."""
    bits = bits_of(x)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if ROUNDING == PARAM_SPLIT:
        top24 = (tl.where(is_nan, 0x7FC00000, bits) + 0x80) >> 8
        high = (top24 + 0x80) >> 8
        return high.to(tl.int16).to(tl.bfloat16, bitcast=True), (top24 - (high << 8)).to(tl.int8)
    elif ROUNDING == PARAM_STOCHASTIC:
        draw = _half_words(key, first, offsets)
        finite = (bits & 0x7FFFFFFF) < 0x7F800000
        if DTYPE == tl.bfloat16:
            high = tl.where(is_nan, 0x7FC00000, bits + tl.where(finite, draw, 0)) >> 16
            return high.to(tl.int16).to(tl.bfloat16, bitcast=True), bits
        else:
            exponent = tl.maximum(bits & 0x7F800000, 113 << 23)
            steps = tl.floor(tl.abs(x) * float_of((254 << 23) - (exponent - (10 << 23))) + (draw >> 3).to(tl.float32) * (1.0 / 8192))
            rounded = steps * float_of(exponent - (10 << 23))
            return tl.where(finite, tl.where(bits < 0, -rounded, rounded), x).to(DTYPE), bits
    else:
        return to_dtype(x, DTYPE, ISA), bits


@triton.jit
def round_bfloat16(x, key, first, offsets, STOCHASTIC: tl.constexpr, ISA: tl.constexpr):
    """What the `bfloat16` codec stores of a moment: finite values stay finite."""
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    too_large = (magnitude > _BFLOAT16_MAX) & (magnitude < 0x7F800000)
    held = tl.where(too_large, float_of((bits & ~0x7FFFFFFF) | _BFLOAT16_MAX), x)
    stored, _ = store_param(held, key, first, offsets, tl.bfloat16, PARAM_STOCHASTIC if STOCHASTIC else PARAM_NEAREST, ISA)
    return stored
