"""residual + gate · x with x saved in 8 bits, on a GPU: one pass. Tiles are a row of lines of groups, a part of a row of the tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats.scaled8 import FORMAT_INDEX, num_row_groups
from ...formats.triton_launch import device_guard, instruction_set, tl_dtype
from ...formats.triton_params import to_dtype, to_float32
from ..row_values import empty_stored, kernel_factor
from ..triton_rows import add_blocks, blocks_of, load_values, store_values
from .settings import ResidualSettings

#: Elements of a tile, and its warps.
_TILE, _NUM_WARPS = 1024, 2


@triton.jit
def _part(row, part, G: tl.constexpr, R: tl.constexpr, WHOLE: tl.constexpr):
    """Groups, columns and masks of the `part`-th R groups of a row."""
    group = part * R + tl.arange(0, R)
    columns = group[:, None] * G + tl.arange(0, G)[None, :]
    exists = group * G < row
    mask = tl.broadcast_to(exists[:, None], [R, G]) if WHOLE else columns < row
    return group, columns, exists, mask


@triton.jit
def gated_residual_kernel(
    residual_ptr,  # float [rows, row]
    x_ptr,  # as residual
    gate_ptr,  # float [segments, row]
    y_ptr,  # as residual
    codes_ptr,  # uint8 [rows, row], FMT 0: as x; None: x is not saved
    scale_ptr,  # float32 [rows, groups]
    row,
    groups,
    segment_rows,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """y = residual + gate · x; codes, scale = encode(x). Programs: rows, parts of a row."""
    line = tl.program_id(0).to(tl.int64)
    group, columns, exists, mask = _part(row, tl.program_id(1), G, R, WHOLE)
    offsets = line * row + columns
    x = to_float32(tl.load(x_ptr + offsets, mask=mask, other=0.0))
    gate = to_float32(tl.load(gate_ptr + (line // segment_rows) * row + columns, mask=mask, other=0.0))
    residual = to_float32(tl.load(residual_ptr + offsets, mask=mask, other=0.0))
    tl.store(y_ptr + offsets, to_dtype(residual + gate * x, DTYPE, ISA), mask=mask)
    if codes_ptr is not None:
        store_values(codes_ptr, scale_ptr, x, offsets, line, group, groups, row, mask, exists, FMT, DTYPE, G, ISA)


@triton.jit
def gated_residual_backward_kernel(
    dy_ptr,  # float [rows, row]
    codes_ptr,  # uint8 [rows, row], FMT 0: float
    scale_ptr,  # float32 [rows, groups]
    gate_ptr,  # float [segments, row]
    dx_ptr,  # as dy, or None
    dgate_ptr,  # float32 [segments, blocks, row], or None
    blocks,  # of a segment
    segment_rows,
    block_rows,
    row,
    groups,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """dx = gate · dy, and the sums over a block of rows that dgate is made of. Programs: blocks, segment by segment; parts of a row."""
    block, segment = (tl.program_id(0) % blocks).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
    group, columns, exists, mask = _part(row, tl.program_id(1), G, R, WHOLE)
    gate = to_float32(tl.load(gate_ptr + segment * row + columns, mask=mask, other=0.0))
    total = tl.zeros([R, G], tl.float32)
    begin = segment * segment_rows + block * block_rows
    end = segment * segment_rows + tl.minimum((block + 1) * block_rows, segment_rows)
    for line in range(begin, end):
        offsets = line * row + columns
        dy = to_float32(tl.load(dy_ptr + offsets, mask=mask, other=0.0))
        if dx_ptr is not None:
            tl.store(dx_ptr + offsets, to_dtype(dy * gate, DTYPE, ISA), mask=mask)
        if dgate_ptr is not None:
            total += dy * load_values(codes_ptr, scale_ptr, offsets, line, group, groups, mask, exists, FMT, ISA)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + tl.program_id(0).to(tl.int64) * row + columns, total, mask=mask)


def geometry(row: int, group_size: int) -> tuple[int, dict[str, int | bool]]:
    """Parts of a row, and the constants that say so."""
    groups = num_row_groups(row, group_size)
    in_tile = min(_TILE // group_size, triton.next_power_of_2(groups))
    return triton.cdiv(groups, in_tile), {"G": group_size, "R": in_tile, "WHOLE": row % group_size == 0}


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor, settings: ResidualSettings, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, row = x.numel() // x.shape[-1], x.shape[-1]
    y, (codes, scale) = torch.empty_like(x), empty_stored(x, settings.fmt, settings.group_size, save)
    parts, constants = geometry(row, settings.group_size)
    if x.numel():
        with device_guard(x):
            gated_residual_kernel[(rows, parts)](
                residual,
                x,
                kernel_factor(gate),
                y,
                codes if save else None,
                scale if save else None,
                row,
                num_row_groups(row, settings.group_size),
                rows * row // gate.numel(),
                FMT=FORMAT_INDEX[settings.fmt],
                DTYPE=tl_dtype(x.dtype),
                **constants,
                ISA=instruction_set(x),
                num_warps=_NUM_WARPS,
            )
    return y, codes, scale


def gated_residual_backward(
    dy: Tensor, saved: tuple[Tensor, Tensor], gate: Tensor, settings: ResidualSettings, need_gate: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    codes, scale = saved
    row = dy.shape[-1]
    segments = gate.numel() // row
    segment_rows = dy.numel() // (row * segments)
    parts, constants = geometry(row, settings.group_size)
    # fewer blocks where a row has several parts, but no fewer than one a multiprocessor
    blocks, block_rows = blocks_of(segment_rows, segments, parts) if need_gate else (segment_rows, 1)
    dx = torch.empty_like(dy) if need_x else dy.new_empty(0)
    dgate = dy.new_zeros((segments, row) if need_gate else 0, dtype=torch.float32)
    partial = dy.new_empty((segments, blocks, row), dtype=torch.float32) if need_gate else None
    if dy.numel() and (need_x or need_gate):
        with device_guard(dy):
            gated_residual_backward_kernel[(blocks * segments, parts)](
                dy,
                codes,
                scale,
                kernel_factor(gate),
                dx if need_x else None,
                partial,
                blocks,
                segment_rows,
                block_rows,
                row,
                num_row_groups(row, settings.group_size),
                FMT=FORMAT_INDEX[settings.fmt],
                DTYPE=tl_dtype(dy.dtype),
                **constants,
                ISA=instruction_set(dy),
                num_warps=_NUM_WARPS,
            )
        if partial is not None:
            add_blocks(partial, dgate)
    return dx, dgate
