"""GELU (exact and tanh), SiLU and their gated forms, with the 8-bit copy that the backward pass reads: schemas, checks, dispatch.

    y = f(x),  dx = dy f'(x)                            coat_kernels::activation, activation_from_codes, activation_backward
    y = f(gate) up                                      coat_kernels::gated_activation, .._from_codes, .._backward

| argument, result | |
|---|---|
| x, gate, up | [..., D], float32, bfloat16, float16, on CPUs also float64; halves of one tensor are read where they lie |
| codes, scale | uint8 [..., D], float32 [..., ceil(D / G)]: `formats/README.md`, "Scaled 8-bit (activations)"; the same on all backends |
| y_amax | float32 [..., ceil(D / G)], largest finite magnitude of y as rounded: stage one of a just-in-time scale; empty unless asked for |
| fmt "none" | nothing is saved: codes and scale come back empty, and the backward ops take x itself as `codes` |
| gated gradient | [..., 2D], the gate's half first or last: what the gradient of one fused projection is |

Computed in float32, rounded once. Off by at most 2e-6 |x| in f and 2e-6 in f', a 2000th of bfloat16's rounding, on every backend. y of a
NaN is NaN, of -inf too (0 · inf, as in torch); the gradient of a NaN or infinite element is NaN and no other element's changes.
`.._from_codes` gives bit for bit what the forward op gives of the decoded values on the same device.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...backends import require_backend
from ...formats.parameters import PARAM_DTYPES
from ...formats.scaled8 import num_row_groups
from .._library import LIBRARY, register
from . import cpu, fake, reference
from .settings import ActivationSettings, Saved

_SAVED = "str kind, str fmt, int group_size"
_GATED_CODES = "Tensor gate_codes, Tensor gate_scale, Tensor up_codes, Tensor up_scale"
LIBRARY.define(f"activation(Tensor x, {_SAVED}, bool amax) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(f"activation_from_codes(Tensor codes, Tensor scale, {_SAVED}, ScalarType dtype) -> Tensor")
LIBRARY.define(f"activation_backward(Tensor dy, Tensor codes, Tensor scale, {_SAVED}) -> Tensor")
LIBRARY.define(f"gated_activation(Tensor gate, Tensor up, {_SAVED}, bool amax) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(f"gated_activation_from_codes({_GATED_CODES}, {_SAVED}, ScalarType dtype) -> Tensor")
LIBRARY.define(f"gated_activation_backward(Tensor dy, {_GATED_CODES}, {_SAVED}, bool gate_first) -> Tensor")


def _may_be_float64(x: Tensor) -> bool:
    """The reference alone computes in float64."""
    return x.device.type in ("cpu", "meta")


def check_values(name: str, x: Tensor) -> None:
    """Tensors that hold numbers: inputs, gradients, and what `fmt` "none" saved."""
    if x.dtype not in PARAM_DTYPES and not (x.dtype == torch.float64 and _may_be_float64(x)):
        raise TypeError(f"{name} must be float32, bfloat16 or float16 (on CPUs also float64), got {x.dtype}; convert it with .to(...)")
    if x.dim() == 0:
        raise ValueError(f"{name} has no last dimension to make groups of; pass {name}[None]")


def check_saved(name: str, saved: Saved, settings: ActivationSettings) -> None:
    """A saved tensor: codes with one scale a group, or with `fmt` "none" the values."""
    codes, scale = saved
    fmt, group_size = settings.fmt, settings.group_size
    if fmt == "none":
        return check_values(name, codes)
    if codes.dtype != torch.uint8:
        raise TypeError(f"{name} of format {fmt!r} must be torch.uint8, got {codes.dtype}; values as they are go with fmt='none'")
    if codes.dim() == 0:
        raise ValueError(f"{name} has no last dimension; codes have the shape of the tensor that was encoded")
    if scale.dtype != torch.float32 and not (scale.dtype == torch.float64 and _may_be_float64(scale)):
        raise TypeError(f"the scale of {name} must be torch.float32, got {scale.dtype}")
    want = (*codes.shape[:-1], num_row_groups(codes.shape[-1], group_size))
    if tuple(scale.shape) != want:
        raise ValueError(
            f"{name} of shape {tuple(codes.shape)} in groups of {group_size} has a scale of shape {want}, got {tuple(scale.shape)}"
        )
    if scale.device != codes.device:
        raise ValueError(f"{name} is on {codes.device} and its scale on {scale.device}; move them to one device")


def check_alike(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    if x.shape != other.shape or x.device != other.device or (dtype and x.dtype != other.dtype):
        raise ValueError(
            f"{name} and {other_name} must agree in shape, device{' and dtype' if dtype else ''}: got {tuple(x.shape)} {x.dtype} on "
            f"{x.device} and {tuple(other.shape)} {other.dtype} on {other.device}"
        )


def _backend(x: Tensor, *others: Tensor, dtype: torch.dtype | None = None) -> Any:
    """The launcher for tensors on x's device; float64, of a tensor or the result, is the reference's alone."""
    chosen = require_backend("activation", x.device)
    if chosen == "Triton":
        return import_module(".triton", __package__)
    exact = torch.float64 in (dtype, x.dtype, *(other.dtype for other in others))
    return reference if exact or chosen == "reference" else cpu


def _activation_arguments(x: Tensor, kind: str, fmt: str, group_size: int, amax: bool) -> tuple[Any, ...]:
    settings = ActivationSettings(kind, fmt, group_size)
    check_values("x", x)
    return x, settings, amax


def _activation(x: Tensor, settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    return _backend(x).activation(x.contiguous(), settings, amax)


def _activation_from_codes_arguments(
    codes: Tensor, scale: Tensor, kind: str, fmt: str, group_size: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    saved, settings = (codes, scale), ActivationSettings(kind, fmt, group_size)
    check_saved("codes", saved, settings)
    return saved, settings, dtype


def _activation_from_codes(saved: Saved, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    codes, scale = saved
    return _backend(*saved, dtype=dtype).activation_from_codes((codes.contiguous(), scale.contiguous()), settings, dtype)


def _activation_backward_arguments(dy: Tensor, codes: Tensor, scale: Tensor, kind: str, fmt: str, group_size: int) -> tuple[Any, ...]:
    saved, settings = (codes, scale), ActivationSettings(kind, fmt, group_size)
    check_values("dy", dy)
    check_saved("codes", saved, settings)
    check_alike("dy", dy, "codes", codes, dtype=False)
    return dy, saved, settings


def _activation_backward(dy: Tensor, saved: Saved, settings: ActivationSettings) -> Tensor:
    codes, scale = saved
    return _backend(dy, *saved).activation_backward(dy.contiguous(), (codes.contiguous(), scale.contiguous()), settings)


def _gated_activation_arguments(gate: Tensor, up: Tensor, kind: str, fmt: str, group_size: int, amax: bool) -> tuple[Any, ...]:
    settings = ActivationSettings(kind, fmt, group_size)
    check_values("gate", gate)
    check_alike("gate", gate, "up", up)
    return gate, up, settings, amax


def _gated_activation(gate: Tensor, up: Tensor, settings: ActivationSettings, amax: bool) -> tuple[Tensor, ...]:
    return _backend(gate).gated_activation(gate, up, settings, amax)


def _gated_saved(gate: Saved, up: Saved, settings: ActivationSettings) -> tuple[Saved, Saved, ActivationSettings]:
    """Checked."""
    check_saved("gate_codes", gate, settings)
    check_saved("up_codes", up, settings)
    check_alike("gate_codes", gate[0], "up_codes", up[0])
    return gate, up, settings


def _gated_activation_from_codes_arguments(
    gate_codes: Tensor, gate_scale: Tensor, up_codes: Tensor, up_scale: Tensor, kind: str, fmt: str, group_size: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    return *_gated_saved((gate_codes, gate_scale), (up_codes, up_scale), ActivationSettings(kind, fmt, group_size)), dtype


def _with_rows(saved: Saved) -> Saved:
    """Of a gated function: codes may be a half of one tensor, scales lie one behind the other."""
    codes, scale = saved
    return codes, scale.contiguous()


def _gated_activation_from_codes(gate: Saved, up: Saved, settings: ActivationSettings, dtype: torch.dtype) -> Tensor:
    return _backend(*gate, dtype=dtype).gated_activation_from_codes(_with_rows(gate), _with_rows(up), settings, dtype)


def _gated_activation_backward_arguments(
    dy: Tensor,
    gate_codes: Tensor,
    gate_scale: Tensor,
    up_codes: Tensor,
    up_scale: Tensor,
    kind: str,
    fmt: str,
    group_size: int,
    gate_first: bool,
) -> tuple[Any, ...]:
    gate, up, settings = _gated_saved((gate_codes, gate_scale), (up_codes, up_scale), ActivationSettings(kind, fmt, group_size))
    check_values("dy", dy)
    check_alike("dy", dy, "gate_codes", gate_codes, dtype=False)
    return dy, gate, up, settings, gate_first


def _gated_activation_backward(dy: Tensor, gate: Saved, up: Saved, settings: ActivationSettings, gate_first: bool) -> Tensor:
    return _backend(dy, *gate).gated_activation_backward(dy.contiguous(), _with_rows(gate), _with_rows(up), settings, gate_first)


register("activation", _activation_arguments, _activation, fake.activation)
register("activation_from_codes", _activation_from_codes_arguments, _activation_from_codes, fake.activation_from_codes)
register("activation_backward", _activation_backward_arguments, _activation_backward, fake.activation_backward)
register("gated_activation", _gated_activation_arguments, _gated_activation, fake.gated_activation)
register(
    "gated_activation_from_codes",
    _gated_activation_from_codes_arguments,
    _gated_activation_from_codes,
    fake.gated_activation_from_codes,
)
register("gated_activation_backward", _gated_activation_backward_arguments, _gated_activation_backward, fake.gated_activation_backward)
