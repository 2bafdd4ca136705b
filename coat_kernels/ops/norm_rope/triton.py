"""RMSNorm of heads with rotary embedding on a GPU: one pass. A program holds several heads of one token, which share weight and rotation.

A tile is the first and the second elements of the heads' pairs, two tensors [HEADS, HALF]. Interleaved pairs are told apart in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats.triton_launch import device_guard, instruction_set, tl_dtype
from ...formats.triton_params import to_dtype, to_float32
from ..row_values import kernel_factor
from ..triton_rows import add_blocks, blocks_of
from .factors import HeadFactors

#: Heads of a tile at most, and elements a thread holds of each of its tensors.
_HEADS, _PER_THREAD = 8, 16
#: The largest head.
_MAX_HEAD = 1024


@triton.jit
def _pair_offsets(line, mask_lines, row, LINES: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr):
    """Offsets and masks of what `_load_pairs` reads: one tensor of whole rows, or the two halves of each."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF)[None, :]
        mask = tl.broadcast_to(mask_lines[:, None], [LINES, 2 * HALF])
        offsets = line[:, None] * row + columns
        whole = mask if WHOLE else mask & (columns < row)
        return offsets, whole, offsets, whole
    else:
        columns = tl.arange(0, HALF)[None, :]
        mask = tl.broadcast_to(mask_lines[:, None], [LINES, HALF])
        offsets = line[:, None] * row + columns
        if WHOLE:
            return offsets, mask, offsets + HALF, mask
        else:
            half = tl.cdiv(row, 2)
            return offsets, mask & (columns < half), offsets + half, mask & (columns < row - half)


@triton.jit
def _load_pairs(ptr, first, first_mask, second, second_mask, LINES: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second elements of pairs, float32 [LINES, HALF]; 0 outside."""
    if INTERLEAVED:
        both = to_float32(tl.load(ptr + first, mask=first_mask, other=0.0))
        return tl.split(tl.reshape(both, [LINES, HALF, 2]))
    else:
        a = to_float32(tl.load(ptr + first, mask=first_mask, other=0.0))
        return a, to_float32(tl.load(ptr + second, mask=second_mask, other=0.0))


@triton.jit
def _store_pairs(ptr, a, b, first, first_mask, second, second_mask, INTERLEAVED: tl.constexpr, DTYPE: tl.constexpr, ISA: tl.constexpr):
    if INTERLEAVED:
        tl.store(ptr + first, to_dtype(tl.interleave(a, b), DTYPE, ISA), mask=first_mask)
    else:
        tl.store(ptr + first, to_dtype(a, DTYPE, ISA), mask=first_mask)
        tl.store(ptr + second, to_dtype(b, DTYPE, ISA), mask=second_mask)


@triton.jit
def _load_shared(ptr, index, row, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr):
    """One row of a table as pairs [1, HALF]."""
    line = index + tl.arange(0, 1)
    first, first_mask, second, second_mask = _pair_offsets(line, line >= 0, row, 1, HALF, INTERLEAVED, WHOLE)
    return _load_pairs(ptr, first, first_mask, second, second_mask, 1, HALF, INTERLEAVED)


@triton.jit
def _load_rotation(cos_ptr, sin_ptr, index, row, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr):
    cos_a, cos_b = _load_shared(cos_ptr, index, row, HALF, INTERLEAVED, WHOLE)
    sin_a, sin_b = _load_shared(sin_ptr, index, row, HALF, INTERLEAVED, WHOLE)
    return cos_a, cos_b, sin_a, sin_b


@triton.jit
def _load_weight(weight_ptr, first_weight_ptr, is_first, row, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr):
    a, b = _load_shared(weight_ptr, 0, row, HALF, INTERLEAVED, WHOLE)
    if first_weight_ptr is not None:
        first_a, first_b = _load_shared(first_weight_ptr, 0, row, HALF, INTERLEAVED, WHOLE)
        a, b = tl.where(is_first, first_a, a), tl.where(is_first, first_b, b)
    return a, b


@triton.jit
def norm_rope_kernel(
    x_ptr,  # float [batches · tokens, heads, row]
    weight_ptr,  # float [row]
    first_weight_ptr,  # float [row] or None
    cos_ptr,  # float [table_tokens, row] or None
    sin_ptr,  # as cos
    y_ptr,  # as x
    rstd_ptr,  # float32 [batches · tokens, heads]
    heads,
    row,
    tokens,
    first_tokens,
    table_tokens,
    eps,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """n = x · rstd · weight; y = (a · cos - b · sin, b · cos + a · sin). Programs: tokens, parts of their heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    line = token * heads + head
    first, first_mask, second, second_mask = _pair_offsets(line, head < heads, row, HEADS, HALF, INTERLEAVED, WHOLE)
    a, b = _load_pairs(x_ptr, first, first_mask, second, second_mask, HEADS, HALF, INTERLEAVED)
    rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / row + eps)
    tl.store(rstd_ptr + line, rstd, mask=head < heads)
    is_first = token % tokens < first_tokens
    weight_a, weight_b = _load_weight(weight_ptr, first_weight_ptr, is_first, row, HALF, INTERLEAVED, WHOLE)
    a = a * rstd[:, None] * weight_a
    b = b * rstd[:, None] * weight_b
    if cos_ptr is not None:
        cos_a, cos_b, sin_a, sin_b = _load_rotation(cos_ptr, sin_ptr, token % table_tokens, row, HALF, INTERLEAVED, WHOLE)
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    _store_pairs(y_ptr, a, b, first, first_mask, second, second_mask, INTERLEAVED, DTYPE, ISA)


@triton.jit
def _backward_token(
    dy_ptr,
    y_ptr,
    rstd_ptr,
    weight_ptr,
    first_weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    token,
    is_first,
    heads,
    row,
    table_tokens,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """dx of some heads of a token; returns what they contribute to the gradient of the weight, as pairs."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    line = token * heads + head
    first, first_mask, second, second_mask = _pair_offsets(line, head < heads, row, HEADS, HALF, INTERLEAVED, WHOLE)
    grad_a, grad_b = _load_pairs(dy_ptr, first, first_mask, second, second_mask, HEADS, HALF, INTERLEAVED)
    norm_a, norm_b = _load_pairs(y_ptr, first, first_mask, second, second_mask, HEADS, HALF, INTERLEAVED)
    if cos_ptr is not None:
        cos_a, cos_b, sin_a, sin_b = _load_rotation(cos_ptr, sin_ptr, token % table_tokens, row, HALF, INTERLEAVED, WHOLE)
        determinant = cos_a * cos_b + sin_a * sin_b
        # 0 outside of the row, and in padding whose tables are zeros: no gradient flows there
        inverse = tl.where(determinant == 0.0, 0.0, 1.0 / determinant)
        norm_a, norm_b = (cos_b * norm_a + sin_a * norm_b) * inverse, (cos_a * norm_b - sin_b * norm_a) * inverse
        grad_a, grad_b = cos_a * grad_a + sin_b * grad_b, cos_b * grad_b - sin_a * grad_a
    weight_a, weight_b = _load_weight(weight_ptr, first_weight_ptr, is_first, row, HALF, INTERLEAVED, WHOLE)
    hat_a = norm_a * tl.where(weight_a == 0.0, 0.0, 1.0 / weight_a)
    hat_b = norm_b * tl.where(weight_b == 0.0, 0.0, 1.0 / weight_b)
    if dx_ptr is not None:
        along = (tl.sum(grad_a * norm_a + grad_b * norm_b, axis=1) / row)[:, None]
        rstd = tl.load(rstd_ptr + line, mask=head < heads, other=0.0)[:, None]
        dx_a = (grad_a * weight_a - hat_a * along) * rstd
        dx_b = (grad_b * weight_b - hat_b * along) * rstd
        _store_pairs(dx_ptr, dx_a, dx_b, first, first_mask, second, second_mask, INTERLEAVED, DTYPE, ISA)
    return grad_a * hat_a, grad_b * hat_b


@triton.jit
def _store_sums(ptr, a, b, row, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    pair = tl.arange(0, HALF)
    half = tl.cdiv(row, 2)
    sum_a, sum_b = tl.sum(a, axis=0), tl.sum(b, axis=0)
    if INTERLEAVED:
        tl.store(ptr + 2 * pair, sum_a, mask=2 * pair < row)
        tl.store(ptr + 2 * pair + 1, sum_b, mask=2 * pair + 1 < row)
    else:
        tl.store(ptr + pair, sum_a, mask=pair < half)
        tl.store(ptr + half + pair, sum_b, mask=pair < row - half)


@triton.jit
def norm_rope_backward_kernel(
    dy_ptr,  # float [batches · tokens, heads, row]
    y_ptr,  # as dy
    rstd_ptr,  # float32 [batches · tokens, heads]
    weight_ptr,  # float [row]
    first_weight_ptr,  # float [row] or None
    cos_ptr,  # float [table_tokens, row] or None
    sin_ptr,  # as cos
    dx_ptr,  # as dy, or None
    partial_ptr,  # float32 [2, blocks · parts, row] of weight and first_weight, or None
    all_tokens,
    block_tokens,
    heads,
    row,
    tokens,
    first_tokens,
    table_tokens,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """dx = (g · weight - h · mean(g · n)) · rstd with n and g being y and dy rotated back, h = n / weight. Programs: blocks, parts."""
    begin = tl.program_id(0).to(tl.int64) * block_tokens
    if partial_ptr is None:
        is_first = begin % tokens < first_tokens
        _backward_token(
            dy_ptr, y_ptr, rstd_ptr, weight_ptr, first_weight_ptr, cos_ptr, sin_ptr, dx_ptr, begin, is_first, heads, row, table_tokens,
            INTERLEAVED, DTYPE, HEADS, HALF, WHOLE, ISA,
        )  # fmt: skip
    else:
        sum_a = tl.zeros([HEADS, HALF], tl.float32)
        sum_b = tl.zeros([HEADS, HALF], tl.float32)
        first_a = tl.zeros([HEADS, HALF], tl.float32)
        first_b = tl.zeros([HEADS, HALF], tl.float32)
        for token in range(begin, tl.minimum(begin + block_tokens, all_tokens)):
            is_first = token % tokens < first_tokens
            a, b = _backward_token(
                dy_ptr, y_ptr, rstd_ptr, weight_ptr, first_weight_ptr, cos_ptr, sin_ptr, dx_ptr, token, is_first, heads, row, table_tokens,
                INTERLEAVED, DTYPE, HEADS, HALF, WHOLE, ISA,
            )  # fmt: skip
            if first_weight_ptr is not None:
                first_a += tl.where(is_first, a, 0.0)
                first_b += tl.where(is_first, b, 0.0)
                a, b = tl.where(is_first, 0.0, a), tl.where(is_first, 0.0, b)
            sum_a += a
            sum_b += b
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        _store_sums(partial_ptr + program * row, sum_a, sum_b, row, HALF, INTERLEAVED)
        if first_weight_ptr is not None:
            programs = tl.num_programs(0) * tl.num_programs(1)
            _store_sums(partial_ptr + (programs + program) * row, first_a, first_b, row, HALF, INTERLEAVED)


def geometry(heads: int, row: int, rotates: bool, interleaved: bool) -> tuple[int, dict[str, int | bool], int]:
    """Parts of a token's heads, the constants of a launch, and its warps."""
    if row > _MAX_HEAD:
        raise ValueError(f"on a GPU heads have at most {_MAX_HEAD} elements, got {row}; use rms_norm and a rotation of its own")
    half = triton.next_power_of_2(triton.cdiv(row, 2))
    in_tile = min(_HEADS, triton.next_power_of_2(heads))
    constants = {"INTERLEAVED": interleaved and rotates, "HEADS": in_tile, "HALF": half, "WHOLE": row == 2 * half}
    return triton.cdiv(heads, in_tile), constants, max(in_tile * 2 * half // (32 * _PER_THREAD), 1)


def norm_rope(x: Tensor, factors: HeadFactors, eps: float) -> tuple[Tensor, Tensor]:
    factors = factors.each(kernel_factor)
    batches, tokens, heads, row = x.shape
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        parts, constants, num_warps = geometry(heads, row, factors.cos is not None, factors.interleaved)
        with device_guard(x):
            norm_rope_kernel[(batches * tokens, parts)](
                x,
                factors.weight,
                factors.first_weight,
                factors.cos,
                factors.sin,
                y,
                rstd,
                heads,
                row,
                tokens,
                factors.first_tokens,
                factors.table_tokens,
                eps,
                **constants,
                DTYPE=tl_dtype(x.dtype),
                ISA=instruction_set(x),
                num_warps=num_warps,
            )
    return y, rstd


def norm_rope_backward(
    dy: Tensor, y: Tensor, rstd: Tensor, factors: HeadFactors, *, need_weight: bool, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    factors = factors.each(kernel_factor)
    batches, tokens, heads, row = y.shape
    dx = torch.empty_like(dy) if need_x else dy.new_empty(0)
    sums = dy.new_zeros((2 if factors.first_weight is not None else 1, row) if need_weight else (2, 0), dtype=torch.float32)
    if dy.numel() and (need_x or need_weight):
        parts, constants, num_warps = geometry(heads, row, factors.cos is not None, factors.interleaved)
        blocks, block_tokens = blocks_of(batches * tokens, parts, 1) if need_weight else (batches * tokens, 1)
        partial = dy.new_empty((sums.shape[0], blocks * parts, row), dtype=torch.float32) if need_weight else None
        with device_guard(dy):
            norm_rope_backward_kernel[(blocks, parts)](
                dy,
                y,
                rstd,
                factors.weight,
                factors.first_weight,
                factors.cos,
                factors.sin,
                dx if need_x else None,
                partial,
                batches * tokens,
                block_tokens,
                heads,
                row,
                tokens,
                factors.first_tokens,
                factors.table_tokens,
                **constants,
                DTYPE=tl_dtype(dy.dtype),
                ISA=instruction_set(dy),
                num_warps=num_warps,
            )
        if partial is not None:
            add_blocks(partial, sums)
    return dx, sums[0].clone(), sums[1].clone() if sums.shape[0] == 2 else sums.new_empty(0)
