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
from ...formats.triton_scaled8 import group_maximum, nan_unless_finite
from ..activation_quant.triton import element_mask, load_tile, store_tile, tile_at, tile_offsets
from .kinds import KIND_INDEX, as_rows
from .reference import MAX_SQUARE, TANH_CURVE, TANH_SLOPE
from .settings import ActivationSettings, Saved

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
    codes_ptr,
    scale_ptr,
    start,  # of the tile in values
    first,  # in codes
    group,  # in scale
    left,
    FMT: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    ISA: tl.constexpr,
):
    """A tile of an operand as float32 [R, G]: its values, or without `values_ptr` those of its codes. Zeros where there are none."""
    offsets, mask = tile_offsets(G, R), element_mask(left, G, R, WHOLE)
    if values_ptr is not None:
        return to_float32(tl.load(values_ptr + start + offsets, mask=mask, other=0.0))
    else:
        return load_tile(codes_ptr, scale_ptr, first, group, left, FMT, G, R, WHOLE, ISA)


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
    within, first, at = group * G, line * row + group * G, line * groups + group
    gate = _read(gate_ptr, gate_codes_ptr, gate_scale_ptr, line * gate_stride + within, first, at, left, FMT, G, R, WHOLE, ISA)
    y = activation_value(gate, KIND, ISA)
    if GATED:
        up = _read(up_ptr, up_codes_ptr, up_scale_ptr, line * up_stride + within, first, at, left, FMT, G, R, WHOLE, ISA)
        y = y * up
    rounded = to_dtype(y, DTYPE, ISA)
    tl.store(y_ptr + first + tile_offsets(G, R), rounded, mask=element_mask(left, G, R, WHOLE))
    if gate_ptr is not None and gate_codes_ptr is not None:
        store_tile(gate, gate_codes_ptr, gate_scale_ptr, first, at, left, FMT, G, R, WHOLE, ISA)
    if up_ptr is not None and up_codes_ptr is not None:
        store_tile(up, up_codes_ptr, up_scale_ptr, first, at, left, FMT, G, R, WHOLE, ISA)
    if y_amax_ptr is not None:
        amax = group_maximum(nan_unless_finite(to_float32(rounded), ISA), ISA)
        rows = tl.arange(0, R)
        tl.store(y_amax_ptr + at + rows, amax, mask=rows * G < left)


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
    within, first, at = group * G, line * row + group * G, line * groups + group
    offsets, mask = tile_offsets(G, R), element_mask(left, G, R, WHOLE)
    dy = to_float32(tl.load(dy_ptr + first + offsets, mask=mask, other=0.0))
    gate = _read(gate_ptr, gate_codes_ptr, gate_scale_ptr, line * gate_stride + within, first, at, left, FMT, G, R, WHOLE, ISA)
    y, slope = activation_slope(gate, KIND, ISA)
    out = line * out_stride + within + offsets
    if GATED:
        up = _read(up_ptr, up_codes_ptr, up_scale_ptr, line * up_stride + within, first, at, left, FMT, G, R, WHOLE, ISA)
        tl.store(dup_ptr + out, to_dtype(dy * y, DTYPE, ISA), mask=mask)
        dy = dy * up
    tl.store(dgate_ptr + out, to_dtype(dy * slope, DTYPE, ISA), mask=mask)


#: Values, codes, scale; None where there is none.
Operand = tuple[Tensor | None, Tensor | None, Tensor | None]


def _launch(
    kernel: Any,
    like: Tensor,
    operands: Sequence[Operand],
    settings: ActivationSettings,
    dtype: torch.dtype,
    *,
    halves: bool = False,
    **arguments: Any,
) -> None:
    """One launch over `like`, which has y's shape. Operands: x, or gate and up. `halves`: out has rows of its own."""
    if not like.numel():
        return
    group_size = settings.group_size
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
            KIND=KIND_INDEX[settings.kind],
            FMT=FORMAT_INDEX[settings.fmt],
            DTYPE=tl_dtype(dtype),
            GATED=len(operands) == 2,
            G=group_size,
            R=rows_each,
            FLAT=whole and even,
            WHOLE=whole,
            ISA=instruction_set(like),
            num_warps=_NUM_WARPS,
        )


def _stored(saved: Saved, settings: ActivationSettings) -> Operand:
    codes, scale = saved
    return (codes, None, None) if settings.fmt == "none" else (None, codes.contiguous(), scale)


def _groups(x: Tensor, settings: ActivationSettings) -> Tensor:
    return torch.empty((*x.shape[:-1], num_row_groups(x.shape[-1], settings.group_size)), dtype=torch.float32, device=x.device)


def _forward(operands: Sequence[Tensor], settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    like, plain = operands[0], settings.fmt == "none"
    empty = like.new_empty(0, dtype=torch.float32)
    y, y_amax = torch.empty(like.shape, dtype=like.dtype, device=like.device), _groups(like, settings) if amax else empty
    rooms: list[Saved] = []
    for _ in operands:
        codes = torch.empty(0 if plain else like.shape, dtype=torch.uint8, device=like.device)
        rooms.append((codes, empty if plain else _groups(like, settings)))
    filled: list[Operand] = [(x, None, None) if plain else (x, *room) for x, room in zip(operands, rooms, strict=True)]
    _launch(forward_kernel, like, filled, settings, like.dtype, y_ptr=y, y_amax_ptr=y_amax if amax else None)
    return y, *(tensor for room in rooms for tensor in room), y_amax


def activation(x: Tensor, settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    return _forward((x,), settings, amax)


def gated_activation(gate: Tensor, up: Tensor, settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    return _forward((gate, up), settings, amax)


def _rebuild(operands: Sequence[Saved], settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    like = operands[0][0]
    y = torch.empty(like.shape, dtype=dtype, device=like.device)
    _launch(forward_kernel, like, [_stored(saved, settings) for saved in operands], settings, dtype, y_ptr=y, y_amax_ptr=None)
    return y


def activation_from_codes(saved: Saved, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    return _rebuild((saved,), settings, dtype)


def gated_activation_from_codes(gate: Saved, up: Saved, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    return _rebuild((gate, up), settings, dtype)


def activation_backward(dy: Tensor, saved: Saved, settings: ActivationSettings) -> Tensor:
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    out = {"dgate_ptr": dx, "dup_ptr": None, "out_stride": dy.shape[-1]}
    _launch(backward_kernel, dy, [_stored(saved, settings)], settings, dy.dtype, dy_ptr=dy, **out)
    return dx


def gated_activation_backward(dy: Tensor, gate: Saved, up: Saved, settings: ActivationSettings, gate_first: bool) -> Tensor:
    packed = torch.empty((*dy.shape[:-1], 2 * dy.shape[-1]), dtype=dy.dtype, device=dy.device)
    halves = packed.chunk(2, dim=-1)
    dgate, dup = halves if gate_first else halves[::-1]
    out = {"dgate_ptr": dgate, "dup_ptr": dup, "out_stride": packed.shape[-1]}
    operands = [_stored(gate, settings), _stored(up, settings)]
    _launch(backward_kernel, dy, operands, settings, dy.dtype, halves=True, dy_ptr=dy, **out)
    return packed
