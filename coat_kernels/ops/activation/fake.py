"""Shapes and dtypes of what the backends return, for tracing. Arguments are checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats.scaled8 import num_row_groups
from .reference import compute_dtype
from .settings import ActivationSettings, Saved


def _groups(x: Tensor, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], num_row_groups(x.shape[-1], settings.group_size)), dtype=dtype)


def _save(x: Tensor, settings: ActivationSettings) -> Saved:
    if settings.fmt == "none":
        return x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), _groups(x, settings, compute_dtype(x.dtype))


def _stage_one(x: Tensor, settings: ActivationSettings, amax: bool) -> Tensor:
    return _groups(x, settings, torch.float32) if amax else x.new_empty(0, dtype=torch.float32)


def activation(x: Tensor, settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_save(x, settings), _stage_one(x, settings, amax)


def activation_from_codes(saved: Saved, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    return saved[0].new_empty(saved[0].shape, dtype=dtype)


def activation_backward(dy: Tensor, saved: Saved, settings: ActivationSettings) -> Tensor:
    return dy.new_empty(dy.shape)


def gated_activation(gate: Tensor, up: Tensor, settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    return gate.new_empty(gate.shape), *_save(gate, settings), *_save(up, settings), _stage_one(gate, settings, amax)


def gated_activation_from_codes(gate: Saved, up: Saved, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    return gate[0].new_empty(gate[0].shape, dtype=dtype)


def gated_activation_backward(dy: Tensor, gate: Saved, up: Saved, settings: ActivationSettings, gate_first: bool) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], 2 * dy.shape[-1]))
