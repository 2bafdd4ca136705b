"""Quantize and dequantize in groups of a row on a GPU: one pass. Formats: `coat_kernels/formats/README.md`, "Scaled 8-bit"."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats.scaled8 import FORMAT_INDEX, num_row_groups
from ...formats.triton_launch import device_guard, instruction_set, tl_dtype
from ...formats.triton_params import to_dtype, to_float32
from ...formats.triton_scaled8 import decode_scaled, encode_scaled

#: Elements a program handles.
_TILE = 2048
_NUM_WARPS = 2


@triton.jit
def tile_at(row, tiles, G: tl.constexpr, R: tl.constexpr, WHOLE: tl.constexpr):
    """Line, first group and elements left in the line of this program's R groups; a line has `tiles` programs, WHOLE a single line."""
    line, tile = tl.program_id(0) * 0, tl.program_id(0)
    if not WHOLE:
        line, tile = tile // tiles, tile % tiles
    group = tile.to(tl.int64) * R
    return line.to(tl.int64), group, row - group * G


@triton.jit
def element_mask(left, G: tl.constexpr, R: tl.constexpr, WHOLE: tl.constexpr):
    """Which elements of a tile [R, G] exist. WHOLE lines of whole groups have a mask that 16-byte accesses can take."""
    rows = tl.arange(0, R)[:, None]
    if WHOLE:
        return tl.broadcast_to(rows * G < left, [R, G])
    else:
        return rows * G + tl.arange(0, G)[None, :] < left


@triton.jit
def tile_offsets(G: tl.constexpr, R: tl.constexpr):
    """Where the elements of a tile [R, G] lie behind its first."""
    return tl.arange(0, R)[:, None] * G + tl.arange(0, G)[None, :]


@triton.jit
def store_tile(
    x,
    codes_ptr,
    scale_ptr,
    first,  # the tile's first element
    group,  # and group in the tensor
    left,  # elements of its line from there on
    FMT: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """Codes and scales of a tile."""
    rows = tl.arange(0, R)
    codes, scale = encode_scaled(x, tl.minimum(left - rows * G, G).to(tl.int32), FMT, ISA)
    tl.store(codes_ptr + first + tile_offsets(G, R), codes, mask=element_mask(left, G, R, WHOLE))
    tl.store(scale_ptr + group + rows, scale, mask=rows * G < left)


@triton.jit
def load_tile(
    codes_ptr,
    scale_ptr,
    first,  # as in store_tile
    group,
    left,
    FMT: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """float32 values of a tile's codes; 0 where there are none."""
    rows = tl.arange(0, R)
    codes = tl.load(codes_ptr + first + tile_offsets(G, R), mask=element_mask(left, G, R, WHOLE), other=0)
    scale = tl.load(scale_ptr + group + rows, mask=rows * G < left, other=1.0)
    return decode_scaled(codes, scale, FMT, ISA)


@triton.jit
def quantize_kernel(
    x_ptr,  # float [lines, row]
    codes_ptr,  # uint8 [lines, row]
    scale_ptr,  # float32 [lines, groups]
    row,
    groups,
    tiles,
    FMT: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """codes, scale = encode(x), by groups of G elements of a line."""
    line, group, left = tile_at(row, tiles, G, R, WHOLE)
    first = line * row + group * G
    x = to_float32(tl.load(x_ptr + first + tile_offsets(G, R), mask=element_mask(left, G, R, WHOLE), other=0.0))
    store_tile(x, codes_ptr, scale_ptr, first, line * groups + group, left, FMT, G, R, WHOLE, ISA)


@triton.jit
def dequantize_kernel(
    codes_ptr,  # uint8 [lines, row]
    scale_ptr,  # float32 [lines, groups]
    out_ptr,  # float [lines, row]
    row,
    groups,
    tiles,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """out = decode(codes, scale), rounded to nearest even in DTYPE."""
    line, group, left = tile_at(row, tiles, G, R, WHOLE)
    first = line * row + group * G
    x = load_tile(codes_ptr, scale_ptr, first, line * groups + group, left, FMT, G, R, WHOLE, ISA)
    tl.store(out_ptr + first + tile_offsets(G, R), to_dtype(x, DTYPE, ISA), mask=element_mask(left, G, R, WHOLE))


def geometry(shape: torch.Size, group_size: int) -> tuple[int, dict[str, int | bool]]:
    """Programs of a launch over a tensor of `shape`, and the arguments that say so. Lines of whole groups are one long line."""
    row = shape[-1]
    lines = shape.numel() // max(row, 1)
    whole = row % group_size == 0
    if whole:
        lines, row = 1, lines * row
    groups = num_row_groups(row, group_size)
    rows = min(_TILE // group_size, triton.next_power_of_2(max(groups, 1)))
    tiles = triton.cdiv(groups, rows)
    return lines * tiles, {"row": row, "groups": groups, "tiles": tiles, "G": group_size, "R": rows, "WHOLE": whole}


def quantize_activation(x: Tensor, fmt: str, group_size: int, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Codes uint8 and scales float32 `scale_shape` of contiguous `x` (float32, bfloat16, float16)."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(scale_shape, dtype=torch.float32, device=x.device)
    programs, arguments = geometry(x.shape, group_size)
    if x.numel():
        with device_guard(x):
            quantize_kernel[(programs,)](x, codes, scale, **arguments, FMT=FORMAT_INDEX[fmt], ISA=instruction_set(x), num_warps=_NUM_WARPS)
    return codes, scale


def dequantize_activation(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    """Values as `dtype` of contiguous `codes` (uint8) and `scale` (float32)."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    programs, arguments = geometry(codes.shape, group_size)
    if codes.numel():
        with device_guard(codes):
            dequantize_kernel[(programs,)](
                codes,
                scale,
                out,
                **arguments,
                FMT=FORMAT_INDEX[fmt],
                DTYPE=tl_dtype(dtype),
                ISA=instruction_set(codes),
                num_warps=_NUM_WARPS,
            )
    return out
