"""Launcher of the C++ activation functions (`csrc/cpu/activation.cpp`). Arguments are checked; gate and up may have strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._native import native
from ...formats.parameters import DTYPE_INDEX
from ...formats.scaled8 import FORMAT_INDEX, num_row_groups
from .kinds import KIND_INDEX, as_rows

#: Values, codes, scale; an empty tensor where there is none.
Operand = tuple[Tensor, Tensor, Tensor]


def _launch(like: Tensor, out: Tensor, operands: Sequence[Operand], **options: int) -> None:
    """One call over all rows of `like`, which has y's shape. Operands: x, or gate and up."""
    if not like.numel():
        return
    width = like.shape[-1]
    alive = []  # copies that as_rows makes
    arguments = {"value_dtype": 0}
    for name, (values, codes, scale) in zip(("gate", "up"), operands, strict=False):
        rows, stride = as_rows(values) if values.numel() else (values, 0)
        alive.append(rows)
        if values.numel():
            arguments["value_dtype"] = DTYPE_INDEX[values.dtype]
        addresses = {"": rows.data_ptr(), "_stride": stride, "_codes": codes.data_ptr(), "_scale": scale.data_ptr()}
        arguments |= {name + key: value for key, value in addresses.items()}
    native.activation(
        rows=like.numel() // width,
        width=width,
        dtype=DTYPE_INDEX[out.dtype],
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
        **arguments,
        **options,
    )


def _options(kind: str, fmt: str, group_size: int) -> dict[str, int]:
    return {"kind": KIND_INDEX[kind], "fmt": FORMAT_INDEX[fmt], "group_size": group_size}


def _groups(x: Tensor, group_size: int) -> Tensor:
    return torch.empty((*x.shape[:-1], num_row_groups(x.shape[-1], group_size)))


def _room_for_codes(x: Tensor, fmt: str, group_size: int) -> tuple[Tensor, Tensor]:
    if fmt == "none":
        return torch.empty(0, dtype=torch.uint8), torch.empty(0)
    return torch.empty(x.shape, dtype=torch.uint8), _groups(x, group_size)


def _stored(codes: Tensor, scale: Tensor, fmt: str) -> Operand:
    """What was saved."""
    nothing = torch.empty(0)
    return (codes, nothing, nothing) if fmt == "none" else (nothing, codes.contiguous(), scale)


def _forward(operands: Sequence[Tensor], kind: str, fmt: str, group_size: int, amax: bool) -> tuple[Tensor, ...]:
    like = operands[0]
    y, y_amax = torch.empty(like.shape, dtype=like.dtype), _groups(like, group_size) if amax else torch.empty(0)
    rooms = [_room_for_codes(like, fmt, group_size) for _ in operands]
    filled = [(values, *room) for values, room in zip(operands, rooms, strict=True)]
    _launch(like, y, filled, out_amax=y_amax.data_ptr(), **_options(kind, fmt, group_size))
    return y, *(tensor for room in rooms for tensor in room), y_amax


def activation(x: Tensor, *, kind: str, fmt: str, group_size: int, amax: bool) -> tuple[Tensor, ...]:
    return _forward((x,), kind, fmt, group_size, amax)


def gated_activation(gate: Tensor, up: Tensor, *, kind: str, fmt: str, group_size: int, amax: bool) -> tuple[Tensor, ...]:
    return _forward((gate, up), kind, fmt, group_size, amax)


def activation_from_codes(codes: Tensor, scale: Tensor, *, kind: str, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    y = torch.empty(codes.shape, dtype=dtype)
    _launch(codes, y, [_stored(codes, scale, fmt)], **_options(kind, fmt, group_size))
    return y


def activation_backward(dy: Tensor, codes: Tensor, scale: Tensor, *, kind: str, fmt: str, group_size: int) -> Tensor:
    dx = torch.empty(dy.shape, dtype=dy.dtype)
    _launch(dy, dx, [_stored(codes, scale, fmt)], dy=dy.data_ptr(), **_options(kind, fmt, group_size))
    return dx


def gated_activation_from_codes(
    gate_codes: Tensor, gate_scale: Tensor, up_codes: Tensor, up_scale: Tensor, *, kind: str, fmt: str, group_size: int, dtype: torch.dtype
) -> Tensor:
    y = torch.empty(gate_codes.shape, dtype=dtype)
    operands = _stored(gate_codes, gate_scale, fmt), _stored(up_codes, up_scale, fmt)
    _launch(gate_codes, y, operands, **_options(kind, fmt, group_size))
    return y


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
    packed = torch.empty((*dy.shape[:-1], 2 * dy.shape[-1]), dtype=dy.dtype)
    operands = _stored(gate_codes, gate_scale, fmt), _stored(up_codes, up_scale, fmt)
    _launch(dy, packed, operands, dy=dy.data_ptr(), gate_first=gate_first, **_options(kind, fmt, group_size))
    return packed
