"""Activation functions on a GPU: f, its 8-bit copy and the output's maxima in one pass; decode and gradient in another.

All three functions are x s(z(x)) with s(z) = 1 / (1 + exp(-z)), see `reference.py`: one exponential and one reciprocal of the special
function unit, 2^-22 and 2^-23 off, where tanh.approx is 5e-4 off and erf takes 28 instructions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats.scaled8 import FORMAT_INDEX, num_row_groups
from ...formats.triton_launch import device_guard, instruction_set, tl_dtype
from ...formats.triton_params import to_dtype, to_float32
from ...formats.triton_ptx import exp2, reciprocal
from ...formats.triton_scaled8 import decode_scaled, encode_scaled, group_maximum, nan_unless_finite
from ..activation_quant.triton import element_mask, tile_at
from .kinds import KIND_INDEX, as_rows
from .reference import MAX_SQUARE, TANH_CURVE, TANH_SLOPE

SILU, GELU = tl.constexpr(KIND_INDEX["silu"]), tl.constexpr(KIND_INDEX["gelu"])
_LOG2_E = math.log2(math.e)
_SILU_LOGIT = tl.constexpr(-_LOG2_E)
_TANH_LOGIT, _TANH_LOGIT_CURVE = tl.constexpr(-_LOG2_E * TANH_SLOPE), tl.constexpr(-_LOG2_E * TANH_CURVE / 3)
_TANH_SLOPE, _TANH_CURVE, _MAX_SQUARE = tl.constexpr(TANH_SLOPE), tl.constexpr(TANH_CURVE), tl.constexpr(MAX_SQUARE)
#: -log2(Phi / (1 - Phi)) / x as a polynomial of x^2, minimax on |x| <= 6 with weights max(Phi (1 - Phi), 1e-5) x: 4.0e-7 in Phi, 3 % of
#: Phi at -6. Own fit.
_ODDS_0, _ODDS_1, _ODDS_2, _ODDS_3, _ODDS_4, _ODDS_5, _ODDS_6 = (
    tl.constexpr(c)
    for c in (
        -2.302199125289917,
        -0.10487488657236099,
        0.00013197999214753509,
        0.00014619779540225863,
        -9.456181942368858e-06,
        2.603019026992115e-07,
        -2.6482906978486653e-09,
    )
)
#: phi(x) = 2^(_DENSITY x^2 + _DENSITY_0).
_DENSITY, _DENSITY_0 = tl.constexpr(-0.5 * _LOG2_E), tl.constexpr(-0.5 * math.log2(2 * math.pi))
_LARGEST = tl.constexpr(3.4028234663852886e38)

#: Elements a program handles; of gated functions half as many, each of which keeps twice as much in registers.
_TILE = 2048
_NUM_WARPS = 2


@triton.jit
def _decay(x, t, KIND: tl.constexpr, ISA: tl.constexpr):
    """exp(-z(x)); t = x^2."""
    if KIND == SILU:
        p = x * _SILU_LOGIT
    elif KIND == GELU:
        p = x * (_ODDS_0 + t * (_ODDS_1 + t * (_ODDS_2 + t * (_ODDS_3 + t * (_ODDS_4 + t * (_ODDS_5 + t * _ODDS_6))))))
    else:
        p = x * (_TANH_LOGIT + t * _TANH_LOGIT_CURVE)
    return exp2(p, ISA)


@triton.jit
def activation_value(x, KIND: tl.constexpr, ISA: tl.constexpr):
    """f(x)."""
    return x * reciprocal(1.0 + _decay(x, x * x, KIND, ISA), ISA)


@triton.jit
def activation_slope(x, KIND: tl.constexpr, ISA: tl.constexpr):
    """f(x) and f'(x); the slope at NaN and +-inf is NaN."""
    t = x * x
    e = _decay(x, t, KIND, ISA)
    s = reciprocal(1.0 + e, ISA)
    y = x * s
    if KIND == GELU:
        slope = s + x * exp2(t * _DENSITY + _DENSITY_0, ISA)
    else:
        rest = y * (tl.minimum(e, _LARGEST) * s)  # 1 - s = e s; where e is inf, s is 0 and its product with any number right
        if KIND != SILU:
            rest = rest * (_TANH_SLOPE + tl.minimum(t, _MAX_SQUARE) * _TANH_CURVE)
        slope = s + rest
    return y, slope


@triton.jit
def _read(
    values_ptr,
    stride,
    codes_ptr,
    scale_ptr,
    line,
    group,
    row,
    groups,
    left,
    FMT: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """A tile of an operand as float32 [R, G]: its values, or without `values_ptr` those of its codes. Zeros where there are none."""
    rows = tl.arange(0, R)
    offsets = rows[:, None] * G + tl.arange(0, G)[None, :]
    mask = element_mask(left, G, R, WHOLE)
    if values_ptr is not None:
        return to_float32(tl.load(values_ptr + line * stride + group * G + offsets, mask=mask, other=0.0))
    else:
        codes = tl.load(codes_ptr + line * row + group * G + offsets, mask=mask, other=0)
        scale = tl.load(scale_ptr + line * groups + group + rows, mask=rows * G < left, other=1.0)
        return decode_scaled(codes, scale, FMT, ISA)


@triton.jit
def _write(
    x,
    codes_ptr,
    scale_ptr,
    line,
    group,
    row,
    groups,
    left,
    FMT: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """Codes and scales of a tile."""
    rows = tl.arange(0, R)
    offsets = rows[:, None] * G + tl.arange(0, G)[None, :]
    codes, scale = encode_scaled(x, tl.minimum(left - rows * G, G).to(tl.int32), FMT, ISA)
    tl.store(codes_ptr + line * row + group * G + offsets, codes, mask=element_mask(left, G, R, WHOLE))
    tl.store(scale_ptr + line * groups + group + rows, scale, mask=rows * G < left)


@triton.jit
def forward_kernel(
    gate_ptr,  # float, lines of `row`, gate_stride apart; None: read the codes
    up_ptr,  # the same; read in GATED alone
    gate_codes_ptr,  # uint8 [lines, row], read or, beside values, written; None: neither
    gate_scale_ptr,  # float32 [lines, groups]
    up_codes_ptr,
    up_scale_ptr,
    y_ptr,  # float [lines, row]
    y_amax_ptr,  # float32 [lines, groups] or None
    gate_stride,
    up_stride,
    row,
    groups,
    tiles,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    FLAT: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """y = f(gate) up, rounded to DTYPE; codes and scales of gate and up; largest finite |y| of each group.

    Values before codes: with anything of y still alive around the encoders' divisions a thread takes 96 registers (sm_90), not 61.
    """
    line, group, left = tile_at(row, tiles, G, R, FLAT)
    gate = _read(gate_ptr, gate_stride, gate_codes_ptr, gate_scale_ptr, line, group, row, groups, left, FMT, G, R, WHOLE, ISA)
    y = activation_value(gate, KIND, ISA)
    if GATED:
        up = _read(up_ptr, up_stride, up_codes_ptr, up_scale_ptr, line, group, row, groups, left, FMT, G, R, WHOLE, ISA)
        y = y * up
    rows = tl.arange(0, R)
    offsets = rows[:, None] * G + tl.arange(0, G)[None, :]
    rounded = to_dtype(y, DTYPE, ISA)
    tl.store(y_ptr + line * row + group * G + offsets, rounded, mask=element_mask(left, G, R, WHOLE))
    if gate_ptr is not None and gate_codes_ptr is not None:
        _write(gate, gate_codes_ptr, gate_scale_ptr, line, group, row, groups, left, FMT, G, R, WHOLE, ISA)
    if up_ptr is not None and up_codes_ptr is not None:
        _write(up, up_codes_ptr, up_scale_ptr, line, group, row, groups, left, FMT, G, R, WHOLE, ISA)
    if y_amax_ptr is not None:
        amax = group_maximum(nan_unless_finite(to_float32(rounded), ISA), ISA)
        tl.store(y_amax_ptr + line * groups + group + rows, amax, mask=rows * G < left)


@triton.jit
def backward_kernel(
    dy_ptr,  # float [lines, row]
    gate_ptr,  # as in forward_kernel
    up_ptr,
    gate_codes_ptr,
    gate_scale_ptr,
    up_codes_ptr,
    up_scale_ptr,
    dgate_ptr,  # float, lines out_stride apart
    dup_ptr,
    gate_stride,
    up_stride,
    out_stride,
    row,
    groups,
    tiles,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    FLAT: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """dgate = dy up f'(gate), dup = dy f(gate), rounded to DTYPE; without GATED dgate = dy f'(gate)."""
    line, group, left = tile_at(row, tiles, G, R, FLAT)
    offsets = tl.arange(0, R)[:, None] * G + tl.arange(0, G)[None, :]
    mask = element_mask(left, G, R, WHOLE)
    dy = to_float32(tl.load(dy_ptr + line * row + group * G + offsets, mask=mask, other=0.0))
    gate = _read(gate_ptr, gate_stride, gate_codes_ptr, gate_scale_ptr, line, group, row, groups, left, FMT, G, R, WHOLE, ISA)
    y, slope = activation_slope(gate, KIND, ISA)
    out = line * out_stride + group * G + offsets
    if GATED:
        up = _read(up_ptr, up_stride, up_codes_ptr, up_scale_ptr, line, group, row, groups, left, FMT, G, R, WHOLE, ISA)
        tl.store(dup_ptr + out, to_dtype(dy * y, DTYPE, ISA), mask=mask)
        dy = dy * up
    tl.store(dgate_ptr + out, to_dtype(dy * slope, DTYPE, ISA), mask=mask)


#: Values, codes, scale; None where there is none.
Operand = tuple[Tensor | None, Tensor | None, Tensor | None]


def _launch(kernel: Any, like: Tensor, operands: Sequence[Operand], group_size: int, *, halves: bool = False, **arguments: Any) -> None:
    """One launch over `like`, which has y's shape. Operands: x, or gate and up. `halves`: out has a row of its own for each row."""
    if not like.numel():
        return
    row, lines = like.shape[-1], like.numel() // like.shape[-1]
    pointers: dict[str, Any] = {}
    even = not halves
    for name, (values, codes, scale) in zip(("gate", "up"), operands, strict=False):
        rows, stride = (None, row) if values is None else as_rows(values)
        even &= stride == row
        pointers |= {f"{name}_ptr": rows, f"{name}_codes_ptr": codes, f"{name}_scale_ptr": scale, f"{name}_stride": stride}
    whole = row % group_size == 0
    if whole and even:  # lines of whole groups, one behind the other, are one long line
        lines, row = 1, lines * row
    groups = num_row_groups(row, group_size)
    tile = _TILE // len(operands)
    rows_each = min(tile // group_size, triton.next_power_of_2(groups))
    tiles = triton.cdiv(groups, rows_each)
    absent = dict.fromkeys(("up_ptr", "up_codes_ptr", "up_scale_ptr")) | {"up_stride": row}
    with device_guard(like):
        kernel[(lines * tiles,)](
            **{**absent, **pointers},
            **arguments,
            row=row,
            groups=groups,
            tiles=tiles,
            GATED=len(operands) == 2,
            G=group_size,
            R=rows_each,
            FLAT=whole and even,
            WHOLE=whole,
            ISA=instruction_set(like),
            num_warps=_NUM_WARPS,
        )


def _stored(codes: Tensor, scale: Tensor, fmt: str) -> Operand:
    """What was saved."""
    return (codes, None, None) if fmt == "none" else (None, codes.contiguous(), scale)


def _groups(x: Tensor, group_size: int) -> Tensor:
    return torch.empty((*x.shape[:-1], num_row_groups(x.shape[-1], group_size)), dtype=torch.float32, device=x.device)


def _forward(operands: Sequence[Tensor], kind: str, fmt: str, group_size: int, amax: bool) -> tuple[Tensor, ...]:
    like = operands[0]
    empty = like.new_empty(0, dtype=torch.float32)
    y, y_amax = torch.empty(like.shape, dtype=like.dtype, device=like.device), _groups(like, group_size) if amax else empty
    rooms: list[tuple[Tensor, Tensor]] = []
    for _ in operands:
        codes = torch.empty(0 if fmt == "none" else like.shape, dtype=torch.uint8, device=like.device)
        rooms.append((codes, empty if fmt == "none" else _groups(like, group_size)))
    filled: list[Operand] = [(x, None, None) if fmt == "none" else (x, *room) for x, room in zip(operands, rooms, strict=True)]
    chosen = {"KIND": KIND_INDEX[kind], "FMT": FORMAT_INDEX[fmt], "DTYPE": tl_dtype(like.dtype)}
    _launch(forward_kernel, like, filled, group_size, y_ptr=y, y_amax_ptr=y_amax if amax else None, **chosen)
    return y, *(tensor for room in rooms for tensor in room), y_amax


def activation(x: Tensor, *, kind: str, fmt: str, group_size: int, amax: bool) -> tuple[Tensor, ...]:
    return _forward((x,), kind, fmt, group_size, amax)


def gated_activation(gate: Tensor, up: Tensor, *, kind: str, fmt: str, group_size: int, amax: bool) -> tuple[Tensor, ...]:
    return _forward((gate, up), kind, fmt, group_size, amax)


def _rebuild(like: Tensor, operands: Sequence[Operand], kind: str, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    y = torch.empty(like.shape, dtype=dtype, device=like.device)
    chosen = {"KIND": KIND_INDEX[kind], "FMT": FORMAT_INDEX[fmt], "DTYPE": tl_dtype(dtype)}
    _launch(forward_kernel, like, operands, group_size, y_ptr=y, y_amax_ptr=None, **chosen)
    return y


def activation_from_codes(codes: Tensor, scale: Tensor, *, kind: str, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    return _rebuild(codes, [_stored(codes, scale, fmt)], kind, fmt, group_size, dtype)


def gated_activation_from_codes(
    gate_codes: Tensor, gate_scale: Tensor, up_codes: Tensor, up_scale: Tensor, *, kind: str, fmt: str, group_size: int, dtype: torch.dtype
) -> Tensor:
    operands = [_stored(gate_codes, gate_scale, fmt), _stored(up_codes, up_scale, fmt)]
    return _rebuild(gate_codes, operands, kind, fmt, group_size, dtype)


def activation_backward(dy: Tensor, codes: Tensor, scale: Tensor, *, kind: str, fmt: str, group_size: int) -> Tensor:
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    chosen = {"KIND": KIND_INDEX[kind], "FMT": FORMAT_INDEX[fmt], "DTYPE": tl_dtype(dy.dtype)}
    out = {"dgate_ptr": dx, "dup_ptr": None, "out_stride": dy.shape[-1]}
    _launch(backward_kernel, dy, [_stored(codes, scale, fmt)], group_size, dy_ptr=dy, **out, **chosen)
    return dx


def gated_activation_backward(
    dy: Tensor,
    gate_codes: Tensor,
    gate_scale: Tensor,
    up_codes: Tensor,
    up_scale: Tensor,
    *,
    kind: str,
    fmt: str,
    group_size: int,
    gate_first: bool,
) -> Tensor:
    packed = torch.empty((*dy.shape[:-1], 2 * dy.shape[-1]), dtype=dy.dtype, device=dy.device)
    halves = packed.chunk(2, dim=-1)
    dgate, dup = halves if gate_first else halves[::-1]
    chosen = {"KIND": KIND_INDEX[kind], "FMT": FORMAT_INDEX[fmt], "DTYPE": tl_dtype(dy.dtype)}
    out = {"dgate_ptr": dgate, "dup_ptr": dup, "out_stride": packed.shape[-1]}
    operands = [_stored(gate_codes, gate_scale, fmt), _stored(up_codes, up_scale, fmt)]
    _launch(backward_kernel, dy, operands, group_size, halves=True, dy_ptr=dy, **out, **chosen)
    return packed
