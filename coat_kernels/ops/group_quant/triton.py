"""Group quantize and dequantize on a GPU: one pass over the tensor. Formats: `coat_kernels/formats/README.md`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import num_groups
from ...formats.codecs import Codec
from ...formats.triton import code_offset, decode_checked, encode_checked, load_codes, store_codes
from ...formats.triton_launch import device_guard, instruction_set, signed32, tl_dtype
from ...formats.triton_params import to_dtype, to_float32

#: Elements a program handles: 16 for each thread of 4 warps.
_TILE = 2048
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["key"])
def quantize_kernel(
    x_ptr,  # float [n]
    codes_ptr,  # uint8 of `Codec.codes_shape`
    amax_ptr,  # float32 [ceil(n / G)]
    k16_ptr,  # uint8 [ceil(n / G)]
    n,
    key,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    ISA: tl.constexpr,
):
    """codes, amax, k16 = encode(x), by groups of G consecutive elements."""
    group = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    offsets = rows[:, None] * G + tl.arange(0, G)[None, :]
    left = n - group * G
    mask = offsets < left
    x = to_float32(tl.load(x_ptr + group * G + offsets, mask=mask, other=0.0))
    codes, amax, k16 = encode_checked(x, key.to(tl.uint32), group * G, offsets, CODEC, SIGNED, STOCHASTIC, ISA)
    store_codes(codes_ptr + code_offset(group * G, CODEC), codes, left, G, ROWS, True, CODEC)
    tl.store(amax_ptr + group + rows, amax, mask=rows * G < left)
    tl.store(k16_ptr + group + rows, k16.to(tl.uint8), mask=rows * G < left)


@triton.jit
def dequantize_kernel(
    codes_ptr,  # uint8 of `Codec.codes_shape`
    amax_ptr,  # float32 [ceil(n / G)]
    k16_ptr,  # uint8 [ceil(n / G)]
    out_ptr,  # float [n]
    n,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    ISA: tl.constexpr,
):
    """out = decode(codes, amax, k16), rounded to nearest even in DTYPE."""
    group = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    offsets = rows[:, None] * G + tl.arange(0, G)[None, :]
    left = n - group * G
    mask = offsets < left
    codes = load_codes(codes_ptr + code_offset(group * G, CODEC), left, G, ROWS, True, CODEC)
    amax = tl.load(amax_ptr + group + rows, mask=rows * G < left, other=0.0)
    k16 = tl.load(k16_ptr + group + rows, mask=rows * G < left, other=16).to(tl.int32)
    values = decode_checked(codes, amax, k16, CODEC, ISA)
    tl.store(out_ptr + group * G + offsets, to_dtype(values, DTYPE, ISA), mask=mask)


def quantize_group(x: Tensor, codec: Codec, group_size: int, signed: bool, rounding: str, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 of `codec.codes_shape(x.shape)`, amax float32 and k16 uint8 [n_groups] of contiguous `x` (float32, bfloat16, float16).

    Args:
        codec: a quantized codec.
        key: of the generator behind rounding="stochastic".
    """
    groups = num_groups(x.numel(), group_size)
    codes = torch.empty(codec.codes_shape(x.shape), dtype=torch.uint8, device=x.device)
    amax = torch.empty(groups, dtype=torch.float32, device=x.device)
    k16 = torch.empty(groups, dtype=torch.uint8, device=x.device)
    if groups:
        rows = _TILE // group_size
        with device_guard(x):
            quantize_kernel[(triton.cdiv(groups, rows),)](
                x,
                codes,
                amax,
                k16,
                x.numel(),
                signed32(key),
                CODEC=codec.index,
                SIGNED=signed,
                STOCHASTIC=rounding == "stochastic",
                G=group_size,
                ROWS=rows,
                ISA=instruction_set(x),
                num_warps=_NUM_WARPS,
            )
    return codes, amax, k16


def dequantize_group(
    codes: Tensor, amax: Tensor, k16: Tensor, codec: Codec, group_size: int, dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    """Values in `shape` of contiguous `codes` (uint8 of `codec.codes_shape(shape)`) with `amax` and `k16` [n_groups], as `dtype`."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    groups = num_groups(out.numel(), group_size)
    if groups:
        rows = _TILE // group_size
        with device_guard(codes):
            dequantize_kernel[(triton.cdiv(groups, rows),)](
                codes,
                amax,
                k16,
                out,
                out.numel(),
                CODEC=codec.index,
                DTYPE=tl_dtype(dtype),
                G=group_size,
                ROWS=rows,
                ISA=instruction_set(codes),
                num_warps=_NUM_WARPS,
            )
    return out
