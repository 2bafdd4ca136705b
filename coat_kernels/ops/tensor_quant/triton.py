"""Two-stage group scaling on a GPU: maxima of groups, a few maxima of those, codes. Formats: `coat_kernels/formats/README.md`.

No atomics: stage two takes the maximum of up to `_PARTIALS` numbers again in every program, from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats.scaled8 import FORMAT_INDEX, MAX, MIN_AMAX
from ...formats.triton_launch import device_guard, instruction_set, tl_dtype
from ...formats.triton_params import to_dtype, to_float32
from ...formats.triton_scaled8 import codes_under, decode_scaled, group_maximum, nan_unless_finite, scale_under
from ..activation_quant.triton import element_mask, geometry, tile_at, tile_offsets

#: Elements a program handles: 32 for each thread of 2 warps.
_TILE = 2048
_NUM_WARPS = 2
#: Maxima that stage two reduces for itself. More go through `partial_kernel` first.
_PARTIALS = 128
#: Numbers that a reduction reads at a time.
_CHUNK = 128
#: Bytes of a side of the square that a program transposes.
_SIDE = 64


@triton.jit
def group_amax_kernel(
    x_ptr,  # float [lines, row]
    amax_ptr,  # float32 [lines, groups]
    row,
    groups,
    tiles,
    G: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """amax = the largest finite |x| of each group. WHOLE: a single line of whole groups."""
    line, group, left = tile_at(row, tiles, G, R, WHOLE)
    rows = tl.arange(0, R)
    mask = element_mask(left, G, R, WHOLE)
    x = to_float32(tl.load(x_ptr + line * row + group * G + tile_offsets(G, R), mask=mask, other=0.0))
    tl.store(amax_ptr + line * groups + group + rows, group_maximum(nan_unless_finite(x, ISA), ISA), mask=rows * G < left)


@triton.jit
def _maximum(values_ptr, count, first, step, CHUNK: tl.constexpr):
    """The largest of chunks `first`, `first + step`, .. of `count` non-negative numbers, as [1]."""
    largest = tl.zeros([1, CHUNK], tl.float32)
    for start in range(first * CHUNK, count, step * CHUNK):
        offsets = start + tl.arange(0, CHUNK)[None, :]
        largest = tl.maximum(largest, tl.load(values_ptr + offsets, mask=offsets < count, other=0.0))
    return tl.max(largest, axis=1)


@triton.jit
def partial_kernel(
    amax_ptr,  # float32 [count]
    partial_ptr,  # float32 [programs]
    count,
    CHUNK: tl.constexpr,
):
    """partial[p] = the largest of every programs-th chunk of amax, from p on."""
    program = tl.program_id(0)
    tl.store(partial_ptr + program + tl.arange(0, 1), _maximum(amax_ptr, count, program, tl.num_programs(0), CHUNK))


@triton.jit
def quantize_kernel(
    x_ptr,  # float [lines, row]
    codes_ptr,  # uint8 [lines, row]
    amax_ptr,  # float32 [lines, count]
    scale_ptr,  # float32 [lines]
    row,
    count,
    tiles,
    FMT: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    ISA: tl.constexpr,
):
    """codes = encode(x) under the largest of its line's `count` maxima; a line has `tiles` programs."""
    # last tiles first: stage one has just read them, and L2 may hold them still
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    line, tile = (program // tiles).to(tl.int64), (program % tiles).to(tl.int64)
    amax = _maximum(amax_ptr + line * count, count, 0, 1, CHUNK)
    offsets = tl.arange(0, TILE)[None, :]
    left = row - tile * TILE
    first = line * row + tile * TILE
    x = to_float32(tl.load(x_ptr + first + offsets, mask=offsets < left, other=0.0))
    tl.store(codes_ptr + first + offsets, codes_under(nan_unless_finite(x, ISA), amax, FMT, True, ISA), mask=offsets < left)
    if tile == 0:
        tl.store(scale_ptr + line + tl.arange(0, 1), scale_under(amax, FMT))


@triton.jit
def dequantize_kernel(
    codes_ptr,  # uint8 [lines, row]
    scale_ptr,  # float32 [lines]
    out_ptr,  # float [lines, row]
    row,
    tiles,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    ISA: tl.constexpr,
):
    """out = decode(codes) under its line's scale, rounded to nearest even in DTYPE."""
    line, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    scale = tl.load(scale_ptr + line + tl.arange(0, 1))
    offsets = tl.arange(0, TILE)[None, :]
    mask = offsets < row - tile * TILE
    first = line * row + tile * TILE
    codes = tl.load(codes_ptr + first + offsets, mask=mask, other=0)
    tl.store(out_ptr + first + offsets, to_dtype(decode_scaled(codes, scale, FMT, ISA), DTYPE, ISA), mask=mask)


@triton.jit
def transpose_kernel(
    codes_ptr,  # uint8 [rows, columns]
    out_ptr,  # uint8 [columns, rows]
    rows,
    columns,
    across,
    SIDE: tl.constexpr,
):
    """out = codes transposed; `across` squares cover the columns."""
    row = (tl.program_id(0) // across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = (tl.program_id(0) % across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    square = tl.load(codes_ptr + row[:, None] * columns + column[None, :], mask=mask, other=0)
    tl.store(out_ptr + column[:, None] * rows + row[None, :], tl.trans(square), mask=tl.trans(mask))


def group_amax(x: Tensor, group_size: int, amax_shape: torch.Size) -> Tensor:
    """Largest finite magnitude of each group of contiguous `x`, float32 `amax_shape`."""
    amax = torch.empty(amax_shape, dtype=torch.float32, device=x.device)
    programs, arguments = geometry(x.shape, group_size)
    if x.numel():
        with device_guard(x):
            group_amax_kernel[(programs,)](x, amax, **arguments, ISA=instruction_set(x), num_warps=_NUM_WARPS)
    return amax


def _few_maxima(group_amax: Tensor) -> Tensor:
    """The maxima of a whole tensor, flat, or `_PARTIALS` that hold the largest of them."""
    if group_amax.numel() <= _PARTIALS:
        return group_amax.view(-1)
    partial = torch.empty(_PARTIALS, dtype=torch.float32, device=group_amax.device)
    partial_kernel[(_PARTIALS,)](group_amax, partial, group_amax.numel(), CHUNK=8 * _CHUNK, num_warps=_NUM_WARPS)
    return partial


def quantize_with_amax(x: Tensor, group_amax: Tensor, fmt: str, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Codes uint8 of contiguous `x` and its scales float32 `scale_shape`, under the largest of contiguous `group_amax`."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    lines = scale_shape.numel()
    if x.numel() == 0:
        return codes, torch.full(scale_shape, MIN_AMAX / MAX[fmt], dtype=torch.float32, device=x.device)
    scale = torch.empty(scale_shape, dtype=torch.float32, device=x.device)
    row = x.numel() // lines
    tiles = triton.cdiv(row, _TILE)
    with device_guard(x):
        maxima = group_amax if scale_shape else _few_maxima(group_amax)
        quantize_kernel[(lines * tiles,)](
            x,
            codes,
            maxima,
            scale,
            row,
            maxima.numel() // lines,
            tiles,
            FMT=FORMAT_INDEX[fmt],
            TILE=_TILE,
            CHUNK=_CHUNK,
            ISA=instruction_set(x),
            num_warps=_NUM_WARPS,
        )
    return codes, scale


def dequantize_tensor(codes: Tensor, scale: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    """Values as `dtype` of contiguous `codes` (uint8) under `scale` (float32: one, or one for each row)."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        row = codes.numel() // scale.numel()
        tiles = triton.cdiv(row, _TILE)
        with device_guard(codes):
            dequantize_kernel[(scale.numel() * tiles,)](
                codes,
                scale,
                out,
                row,
                tiles,
                FMT=FORMAT_INDEX[fmt],
                DTYPE=tl_dtype(dtype),
                TILE=_TILE,
                ISA=instruction_set(codes),
                num_warps=_NUM_WARPS,
            )
    return out


def transpose_codes(codes: Tensor) -> Tensor:
    """[columns, rows] of a contiguous matrix of one-byte codes."""
    rows, columns = codes.shape
    out = torch.empty((columns, rows), dtype=codes.dtype, device=codes.device)
    across = triton.cdiv(columns, _SIDE)
    if codes.numel():
        with device_guard(codes):
            transpose_kernel[(triton.cdiv(rows, _SIDE) * across,)](
                codes.view(torch.uint8), out.view(torch.uint8), rows, columns, across, SIDE=_SIDE, num_warps=4
            )
    return out
