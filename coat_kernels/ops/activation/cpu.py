"""Launcher of the C++ activation functions (`csrc/cpu/activation.cpp`). Arguments are checked; gate and up may have strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._native import native
from ...formats.parameters import DTYPE_INDEX
from ...formats.scaled8 import FORMAT_INDEX, num_row_groups
from .kinds import KIND_INDEX, as_rows
from .settings import ActivationSettings, Saved

#: Values, codes, scale; an empty tensor where there is none.
Operand = tuple[Tensor, Tensor, Tensor]


def _launch(like: Tensor, out: Tensor, operands: Sequence[Operand], settings: ActivationSettings, **options: int) -> None:
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
        kind=KIND_INDEX[settings.kind],
        fmt=FORMAT_INDEX[settings.fmt],
        group_size=settings.group_size,
        threads=torch.get_num_threads(),
        **arguments,
        **options,
    )


def _groups(x: Tensor, settings: ActivationSettings) -> Tensor:
    return torch.empty((*x.shape[:-1], num_row_groups(x.shape[-1], settings.group_size)))


def _room_for_codes(x: Tensor, settings: ActivationSettings) -> Saved:
    if settings.fmt == "none":
        return torch.empty(0, dtype=torch.uint8), torch.empty(0)
    return torch.empty(x.shape, dtype=torch.uint8), _groups(x, settings)


def _stored(saved: Saved, settings: ActivationSettings) -> Operand:
    nothing, (codes, scale) = torch.empty(0), saved
    return (codes, nothing, nothing) if settings.fmt == "none" else (nothing, codes.contiguous(), scale)


def _forward(operands: Sequence[Tensor], settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    like = operands[0]
    y, y_amax = torch.empty(like.shape, dtype=like.dtype), _groups(like, settings) if amax else torch.empty(0)
    rooms = [_room_for_codes(like, settings) for _ in operands]
    filled = [(values, *room) for values, room in zip(operands, rooms, strict=True)]
    _launch(like, y, filled, settings, out_amax=y_amax.data_ptr())
    return y, *(tensor for room in rooms for tensor in room), y_amax


def activation(x: Tensor, settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    return _forward((x,), settings, amax)


def gated_activation(gate: Tensor, up: Tensor, settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    return _forward((gate, up), settings, amax)


def _rebuild(operands: Sequence[Saved], settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    like = operands[0][0]
    y = torch.empty(like.shape, dtype=dtype)
    _launch(like, y, [_stored(saved, settings) for saved in operands], settings)
    return y


def activation_from_codes(saved: Saved, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    return _rebuild((saved,), settings, dtype)


def gated_activation_from_codes(gate: Saved, up: Saved, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    return _rebuild((gate, up), settings, dtype)


def activation_backward(dy: Tensor, saved: Saved, settings: ActivationSettings) -> Tensor:
    dx = torch.empty(dy.shape, dtype=dy.dtype)
    _launch(dy, dx, [_stored(saved, settings)], settings, dy=dy.data_ptr())
    return dx


def gated_activation_backward(dy: Tensor, gate: Saved, up: Saved, settings: ActivationSettings, gate_first: bool) -> Tensor:
    packed = torch.empty((*dy.shape[:-1], 2 * dy.shape[-1]), dtype=dy.dtype)
    operands = _stored(gate, settings), _stored(up, settings)
    _launch(dy, packed, operands, settings, dy=dy.data_ptr(), gate_first=gate_first)
    return packed
