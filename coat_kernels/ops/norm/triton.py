"""RMSNorm and LayerNorm that save 8 bits, on a GPU: one pass over whole rows. Formulas: `__init__.py`; tiles: `ops/triton_rows.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats.scaled8 import FORMAT_INDEX, num_row_groups
from ...formats.triton_launch import device_guard, instruction_set, tl_dtype
from ...formats.triton_params import to_dtype, to_float32
from ...formats.triton_scaled8 import group_maximum, nan_unless_finite
from ..row_values import empty_stored, kernel_factor
from ..triton_rows import (
    RowTiles,
    add_blocks,
    blocks_of,
    load_factor,
    load_values,
    row_sum,
    store_block_sums,
    store_values,
    tile_lines,
    tile_of,
)
from .settings import NormGradients, NormSettings

#: A larger tile has no registers for dx and two sums at a time: it is read once for each.
_FUSED_TILE = 8192


@triton.jit
def _scaled_and_shifted(xhat, gain_ptr, shift_ptr, line, columns, mask, row, segment_rows, PLUS_ONE: tl.constexpr):
    segment = line // segment_rows
    y = xhat
    if gain_ptr is not None:
        gain = load_factor(gain_ptr, segment, row, columns, mask)
        y = y * ((gain + 1.0) if PLUS_ONE else gain)
    if shift_ptr is not None:
        y += load_factor(shift_ptr, segment, row, columns, mask)
    return y


@triton.jit
def norm_kernel(
    x_ptr,  # float [rows, row]
    gain_ptr,  # float [segments, row] or None
    shift_ptr,  # float [segments, row] or None
    y_ptr,  # as x
    codes_ptr,  # uint8 [rows, row], FMT 0: as x; None: nothing is saved
    scale_ptr,  # float32 [rows, groups]
    rstd_ptr,  # float32 [rows]
    amax_ptr,  # float32 [rows, groups] or None
    rows,
    row,
    groups,
    segment_rows,
    eps,
    CENTER: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """y = xhat · gain + shift; codes, scale = encode(xhat)."""
    line, group, columns, offsets, mask, exists = tile_of(tl.program_id(0).to(tl.int64) * ROWS, rows, row, G, GROUPS, ROWS, WHOLE)
    x = to_float32(tl.load(x_ptr + offsets, mask=mask, other=0.0))
    if CENTER:
        x = tl.where(mask, x - (row_sum(x, GROUPS, ROWS) / row)[:, None], 0.0)
    rstd = tl.rsqrt(row_sum(x * x, GROUPS, ROWS) / row + eps)
    xhat = x * rstd[:, None]
    y = to_dtype(_scaled_and_shifted(xhat, gain_ptr, shift_ptr, line, columns, mask, row, segment_rows, PLUS_ONE), DTYPE, ISA)
    tl.store(y_ptr + offsets, y, mask=mask)
    if amax_ptr is not None:
        values = tl.where(mask, to_float32(y), 0.0)
        tl.store(amax_ptr + line * groups + group, group_maximum(nan_unless_finite(values, ISA), ISA), mask=exists)
    if codes_ptr is not None:
        store_values(codes_ptr, scale_ptr, xhat, offsets, line, group, groups, row, mask, exists, FMT, DTYPE, G, ISA)
        tl.store(rstd_ptr + line, rstd, mask=(line < rows) & (group == 0))


@triton.jit
def norm_from_codes_kernel(
    codes_ptr,  # uint8 [rows, row], FMT 0: float
    scale_ptr,  # float32 [rows, groups]
    gain_ptr,  # float [segments, row] or None
    shift_ptr,  # float [segments, row] or None
    y_ptr,  # float [rows, row]
    rows,
    row,
    groups,
    segment_rows,
    PLUS_ONE: tl.constexpr,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """y = decode(codes, scale) · gain + shift."""
    line, group, columns, offsets, mask, exists = tile_of(tl.program_id(0).to(tl.int64) * ROWS, rows, row, G, GROUPS, ROWS, WHOLE)
    xhat = load_values(codes_ptr, scale_ptr, offsets, line, group, groups, mask, exists, FMT, ISA)
    y = _scaled_and_shifted(xhat, gain_ptr, shift_ptr, line, columns, mask, row, segment_rows, PLUS_ONE)
    tl.store(y_ptr + offsets, to_dtype(y, DTYPE, ISA), mask=mask)


@triton.jit
def _backward_tile(
    dy_ptr,
    codes_ptr,
    scale_ptr,
    rstd_ptr,
    gain_ptr,
    dx_ptr,
    first,
    end,
    row,
    groups,
    segment_rows,
    CENTER: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """dx of the tile at row `first`; returns its dy and xhat."""
    line, group, columns, offsets, mask, exists = tile_of(first, end, row, G, GROUPS, ROWS, WHOLE)
    dy = to_float32(tl.load(dy_ptr + offsets, mask=mask, other=0.0))
    xhat = load_values(codes_ptr, scale_ptr, offsets, line, group, groups, mask, exists, FMT, ISA)
    if dx_ptr is not None:
        grad = dy
        if gain_ptr is not None:
            gain = load_factor(gain_ptr, line // segment_rows, row, columns, mask)
            grad = dy * ((gain + 1.0) if PLUS_ONE else gain)
        inner = grad - xhat * (row_sum(grad * xhat, GROUPS, ROWS) / row)[:, None]
        if CENTER:
            inner -= (row_sum(grad, GROUPS, ROWS) / row)[:, None]
        rstd = tl.load(rstd_ptr + line, mask=line < end, other=0.0)
        tl.store(dx_ptr + offsets, to_dtype(inner * rstd[:, None], DTYPE, ISA), mask=mask)
    return dy, xhat


@triton.jit
def norm_backward_kernel(
    dy_ptr,  # float [rows, row]
    codes_ptr,  # uint8 [rows, row], FMT 0: float
    scale_ptr,  # float32 [rows, groups]
    rstd_ptr,  # float32 [rows]
    gain_ptr,  # float [segments, row] or None
    dx_ptr,  # as dy, or None
    dgain_ptr,  # float32 [segments, blocks, row] or None
    dshift_ptr,  # float32 [segments, blocks, row] or None
    blocks,  # of a segment of the sums
    run_rows,  # of a segment of the sums
    block_rows,
    row,
    groups,
    segment_rows,  # of a segment of gain
    CENTER: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """dx, and the sums over a block of rows that dgain and dshift are made of. Programs: blocks, one segment's after the other's."""
    block, segment = (tl.program_id(0) % blocks).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
    end = segment * run_rows + tl.minimum((block + 1) * block_rows, run_rows)
    begin = segment * run_rows + block * block_rows
    if dgain_ptr is None and dshift_ptr is None:
        _backward_tile(
            dy_ptr, codes_ptr, scale_ptr, rstd_ptr, gain_ptr, dx_ptr, begin, end, row, groups, segment_rows,
            CENTER, PLUS_ONE, FMT, DTYPE, G, GROUPS, ROWS, WHOLE, ISA,
        )  # fmt: skip
    else:
        dgain = tl.zeros([ROWS * GROUPS, G], tl.float32)
        dshift = tl.zeros([ROWS * GROUPS, G], tl.float32)
        for first in range(begin, end, ROWS):
            dy, xhat = _backward_tile(
                dy_ptr, codes_ptr, scale_ptr, rstd_ptr, gain_ptr, dx_ptr, first, end, row, groups, segment_rows,
                CENTER, PLUS_ONE, FMT, DTYPE, G, GROUPS, ROWS, WHOLE, ISA,
            )  # fmt: skip
            if dgain_ptr is not None:
                dgain += dy * xhat
            if dshift_ptr is not None:
                dshift += dy
        _, group = tile_lines(begin, GROUPS, ROWS)
        place = tl.program_id(0).to(tl.int64) * row
        if dgain_ptr is not None:
            store_block_sums(dgain_ptr + place, dgain, group, row, G, GROUPS, ROWS)
        if dshift_ptr is not None:
            store_block_sums(dshift_ptr + place, dshift, group, row, G, GROUPS, ROWS)


def _segment_rows(rows: int, row: int, gain: Tensor | None, shift: Tensor | None) -> int:
    given = gain if gain is not None else shift
    return rows if given is None else max(rows * row // given.numel(), 1)


def norm(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, settings: NormSettings, *, eps: float, amax: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tiles = RowTiles(x.numel() // x.shape[-1], x.shape[-1], settings.group_size)
    gain, shift = kernel_factor(gain), kernel_factor(shift)
    y, (codes, scale) = torch.empty_like(x), empty_stored(x, settings.fmt, settings.group_size, save)
    rstd = x.new_empty(tiles.rows if save else 0, dtype=torch.float32)
    y_amax = x.new_empty((*x.shape[:-1], num_row_groups(tiles.row, settings.group_size)) if amax else 0, dtype=torch.float32)
    if x.numel():
        with device_guard(x):
            norm_kernel[(tiles.programs,)](
                x,
                gain,
                shift,
                y,
                codes if save else None,
                scale if save else None,
                rstd if save else None,
                y_amax if amax else None,
                tiles.rows,
                tiles.row,
                tiles.groups,
                _segment_rows(tiles.rows, tiles.row, gain, shift),
                eps,
                CENTER=settings.center,
                PLUS_ONE=settings.plus_one,
                FMT=FORMAT_INDEX[settings.fmt],
                DTYPE=tl_dtype(x.dtype),
                **tiles.constants(),
                ISA=instruction_set(x),
                num_warps=tiles.num_warps,
            )
    return y, codes, scale, rstd, y_amax


def norm_from_codes(
    codes: Tensor, scale: Tensor, gain: Tensor | None, shift: Tensor | None, settings: NormSettings, dtype: torch.dtype
) -> Tensor:
    tiles = RowTiles(codes.numel() // codes.shape[-1], codes.shape[-1], settings.group_size)
    gain, shift = kernel_factor(gain), kernel_factor(shift)
    y = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        with device_guard(codes):
            norm_from_codes_kernel[(tiles.programs,)](
                codes,
                scale,
                gain,
                shift,
                y,
                tiles.rows,
                tiles.row,
                tiles.groups,
                _segment_rows(tiles.rows, tiles.row, gain, shift),
                PLUS_ONE=settings.plus_one,
                FMT=FORMAT_INDEX[settings.fmt],
                DTYPE=tl_dtype(dtype),
                **tiles.constants(),
                ISA=instruction_set(codes),
                num_warps=tiles.num_warps,
            )
    return y


def _launch_backward(
    dy: Tensor,
    kept: tuple[Tensor, Tensor, Tensor],
    gain: Tensor | None,
    outputs: Sequence[Tensor | None],
    settings: NormSettings,
    segments: int,
) -> None:
    """One pass that fills those of `outputs` (dx, dgain, dshift) that are not None, from `kept`: codes, scale, rstd."""
    dx, dgain, dshift = outputs
    sums = dgain is not None or dshift is not None
    tiles = RowTiles(dy.numel() // dy.shape[-1], dy.shape[-1], settings.group_size, per_thread=16 if sums else 32)
    run_rows = tiles.rows // segments if sums else tiles.rows
    blocks, block_rows = blocks_of(run_rows, segments, tiles.rows_in_tile) if sums else (tiles.programs, tiles.rows_in_tile)
    partial = [None if out is None else dy.new_empty((segments, blocks, tiles.row), dtype=torch.float32) for out in (dgain, dshift)]
    with device_guard(dy):
        norm_backward_kernel[(blocks * (segments if sums else 1),)](
            dy,
            *kept,
            gain,
            dx,
            *partial,
            blocks,
            run_rows,
            block_rows,
            tiles.row,
            tiles.groups,
            _segment_rows(tiles.rows, tiles.row, gain, None),
            CENTER=settings.center,
            PLUS_ONE=settings.plus_one,
            FMT=FORMAT_INDEX[settings.fmt],
            DTYPE=tl_dtype(dy.dtype),
            **tiles.constants(),
            ISA=instruction_set(dy),
            num_warps=tiles.num_warps,
        )
    for out, each in zip((dgain, dshift), partial, strict=True):
        if out is not None and each is not None:
            add_blocks(each, out)


def norm_backward(
    dy: Tensor, codes: Tensor, scale: Tensor, rstd: Tensor, gain: Tensor | None, settings: NormSettings, wanted: NormGradients
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = RowTiles(dy.numel() // dy.shape[-1], dy.shape[-1], settings.group_size)
    dx = torch.empty_like(dy) if wanted.x else dy.new_empty(0)
    dgain, dshift = (dy.new_zeros((wanted.segments, tiles.row) if need else 0, dtype=torch.float32) for need in (wanted.gain, wanted.shift))
    outputs = [dx if wanted.x else None, dgain if wanted.gain else None, dshift if wanted.shift else None]
    passes = [outputs]
    if tiles.tile > _FUSED_TILE and (wanted.gain or wanted.shift):
        passes = [[out if i == k else None for i, out in enumerate(outputs)] for k in range(3)]
    for each in passes:
        if dy.numel() and any(out is not None for out in each):
            _launch_backward(dy, (codes, scale, rstd), kernel_factor(gain), each, settings, wanted.segments)
    return dx, dgain, dshift
