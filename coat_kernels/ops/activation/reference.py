"""The PyTorch backend of the activation functions, in float32 (float64 inputs: in float64).

With s(t) = 1 / (1 + exp(-t)), Phi and phi the standard normal's distribution and density, c = sqrt(2 / pi):

    silu       f(x) = x s(x)           f'(x) = s + x s (1 - s)
    gelu_tanh  f(x) = x s(z)           f'(x) = s + x s (1 - s) z',   z = 2 c (x + 0.044715 x^3)
    gelu       f(x) = x Phi(x)         f'(x) = Phi + x phi

0.5 (1 + tanh(z / 2)) is s(z): it keeps its digits where x is far below zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...formats.scaled8 import decode, encode, group_amax
from .settings import ActivationSettings, Saved

#: z' = TANH_SLOPE + TANH_CURVE x^2.
TANH_SLOPE = 2 * math.sqrt(2 / math.pi)
TANH_CURVE = 3 * 0.044715 * TANH_SLOPE
#: z' stands still from this x^2 on, where s (1 - s) has long been 0: their product stays defined.
MAX_SQUARE = 1e6


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def value(x: Tensor, kind: str) -> Tensor:
    """f(x) of float32 or float64 `x`."""
    if kind == "gelu":
        return x * (0.5 * torch.special.erfc(x * -math.sqrt(0.5)))
    return x * torch.sigmoid(_logit(x, kind))


def value_and_slope(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x); the slope at NaN and +-inf is NaN."""
    if kind == "gelu":
        below = 0.5 * torch.special.erfc(x * -math.sqrt(0.5))
        return x * below, below + x * (torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi))
    s = torch.sigmoid(_logit(x, kind))
    y = x * s
    rest = y * (1 - s)
    if kind == "gelu_tanh":
        rest = rest * (TANH_SLOPE + TANH_CURVE * x.square().clamp(max=MAX_SQUARE))
    return y, s + rest


def _logit(x: Tensor, kind: str) -> Tensor:
    return x if kind == "silu" else x * (TANH_SLOPE + TANH_CURVE / 3 * x.square())


def _load(saved: Saved, settings: ActivationSettings) -> Tensor:
    """What was saved, as float32 or float64."""
    codes, scale = saved
    if settings.fmt == "none":
        return codes.contiguous().to(compute_dtype(codes.dtype))
    return decode(codes, scale, settings.fmt, settings.group_size, scale.dtype)


def _save(x: Tensor, settings: ActivationSettings) -> Saved:
    if settings.fmt == "none":
        return x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.float32)
    return encode(x, settings.fmt, settings.group_size)


def _stage_one(y: Tensor, settings: ActivationSettings, amax: bool) -> Tensor:
    """float32 [..., ceil(D / G)], the largest finite magnitude of each group; empty unless asked for."""
    return group_amax(y, settings.group_size).float() if amax else y.new_empty(0, dtype=torch.float32)


def activation(x: Tensor, settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    y = value(x.to(compute_dtype(x.dtype)), settings.kind).to(x.dtype)
    return y, *_save(x, settings), _stage_one(y, settings, amax)


def activation_from_codes(saved: Saved, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    return value(_load(saved, settings), settings.kind).to(dtype)


def activation_backward(dy: Tensor, saved: Saved, settings: ActivationSettings) -> Tensor:
    _, slope = value_and_slope(_load(saved, settings), settings.kind)
    return (dy.to(slope.dtype) * slope).to(dy.dtype)


def gated_activation(gate: Tensor, up: Tensor, settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    gate, up, wide = gate.contiguous(), up.contiguous(), compute_dtype(gate.dtype)
    y = (value(gate.to(wide), settings.kind) * up.to(wide)).to(gate.dtype)
    return y, *_save(gate, settings), *_save(up, settings), _stage_one(y, settings, amax)


def gated_activation_from_codes(gate: Saved, up: Saved, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    return (value(_load(gate, settings), settings.kind) * _load(up, settings)).to(dtype)


def gated_activation_backward(dy: Tensor, gate: Saved, up: Saved, settings: ActivationSettings, gate_first: bool) -> Tensor:
    y, slope = value_and_slope(_load(gate, settings), settings.kind)
    wide = dy.to(slope.dtype)
    halves = (wide * _load(up, settings) * slope).to(dy.dtype), (wide * y).to(dy.dtype)
    return torch.cat(halves if gate_first else halves[::-1], dim=-1)
