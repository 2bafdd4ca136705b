"""GELU, SiLU, SwiGLU and GEGLU whose backward pass reads an 8-bit copy of the input, written by the forward kernel.

The copy costs 1 + 4 / group_size bytes an element where torch saves the input whole. Outputs are those of the uncompressed input: the
8 bits touch gradients only, and whatever consumer saves the output can have it rebuilt from the codes (`saved.offer`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats.scaled8 import check_format, check_group
from ..ops import activation as _registers_the_ops  # noqa: F401
from . import saved, shared
from .first_order import first_order

_OPS: Any = torch.ops.coat_kernels
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def _plain_format(x: Tensor, fmt: str, group_size: int) -> str:
    """`fmt`; float64, which is there to check gradients, is saved as it is."""
    check_group(group_size)
    return "none" if check_format(fmt, allow_none=True) and x.dtype == torch.float64 else fmt


class _Activation(torch.autograd.Function):
    """x -> f(x), maxima of its groups, codes, scale. The last three are outputs so that the caller can hand them on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, fmt: str, group_size: int, amax: bool) -> tuple[Tensor, ...]:
        y, codes, scale, y_amax = _OPS.activation(x, kind, fmt, group_size, amax)
        ctx.options = (kind, fmt, group_size)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(codes, scale, y_amax)
        ctx.save_for_backward(x if fmt == "none" else codes, scale)
        return y, y_amax, codes, scale

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        dx = None if dy is None else _OPS.activation_backward(dy, *ctx.saved_tensors, *ctx.options)
        return dx, None, None, None, None


class _Gated(torch.autograd.Function):
    """gate, up -> f(gate) up, and the codes and scales of both."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str, fmt: str, group_size: int, amax: bool) -> tuple[Tensor, ...]:
        y, *codes, y_amax = _OPS.gated_activation(gate, up, kind, fmt, group_size, amax)
        _keep(ctx, codes, y_amax, gate, up, kind, fmt, group_size)
        return y, y_amax, *codes

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None, None
        dgate, dup = _OPS.gated_activation_backward(dy, *ctx.saved_tensors, *ctx.options, True).chunk(2, dim=-1)
        return dgate, dup, None, None, None, None


class _GatedPacked(torch.autograd.Function):
    """The same of the two halves of one tensor, whose gradient comes back whole."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, kind: str, gate_first: bool, fmt: str, group_size: int, amax: bool) -> tuple[Tensor, ...]:
        gate, up = _halves(packed, gate_first)
        y, *codes, y_amax = _OPS.gated_activation(gate, up, kind, fmt, group_size, amax)
        if fmt == "none":
            gate, up = packed, packed.new_empty(0)
        _keep(ctx, codes, y_amax, gate, up, kind, fmt, group_size)
        ctx.gate_first = gate_first
        return y, y_amax, *codes

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None, None
        gate, gate_scale, up, up_scale = ctx.saved_tensors
        if ctx.options[1] == "none":
            gate, up = _halves(gate, ctx.gate_first)
        packed = _OPS.gated_activation_backward(dy, gate, gate_scale, up, up_scale, *ctx.options, ctx.gate_first)
        return packed, None, None, None, None, None


def _halves(packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = packed.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _keep(ctx: Any, codes: list[Tensor], y_amax: Tensor, gate: Tensor, up: Tensor, kind: str, fmt: str, group_size: int) -> None:
    gate_codes, gate_scale, up_codes, up_scale = codes
    ctx.options = (kind, fmt, group_size)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*codes, y_amax)
    ctx.save_for_backward(gate if fmt == "none" else gate_codes, gate_scale, up if fmt == "none" else up_codes, up_scale)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _activation(x: Tensor, kind: str, fmt: str, group_size: int) -> Tensor:
    fmt = _plain_format(x, fmt, group_size)
    if not _needs_gradient(x):
        return _OPS.activation(x, kind, "none", group_size, False)[0]
    return _offer(_Activation.apply(x, kind, fmt, group_size, shared.wants_amax(x)), _OPS.activation_from_codes, kind, fmt, group_size)


def _offer(outputs: tuple[Tensor, ...], from_codes: Any, kind: str, fmt: str, group_size: int) -> Tensor:
    """The first output; those who read it are told how to rebuild it, and the maxima of its groups."""
    y, y_amax, *codes = outputs
    if not torch.compiler.is_compiling():
        shared.offer_amax(y, y_amax)
        dtype = y.dtype
        if fmt != "none":
            saved.offer(y, lambda: from_codes(*codes, kind, fmt, group_size, dtype))
    return y


def _gated(gate: Tensor, up: Tensor, kind: str, fmt: str, group_size: int) -> Tensor:
    fmt = _plain_format(gate, fmt, group_size)
    if not _needs_gradient(gate, up):
        return _OPS.gated_activation(gate, up, kind, "none", group_size, False)[0]
    outputs = _Gated.apply(gate, up, kind, fmt, group_size, shared.wants_amax(gate))
    return _offer(outputs, _OPS.gated_activation_from_codes, kind, fmt, group_size)


def _gelu_kind(approximate: str) -> str:
    if approximate not in _GELU:
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return _GELU[approximate]


def gelu(x: Tensor, approximate: str = "none", *, fmt: str = "e4m3", group_size: int = 128) -> Tensor:
    """`torch.nn.functional.gelu` that saves `x` in 8 bits.

    Args:
        x: [..., D], float32, bfloat16 or float16; float64 on CPUs, which is saved uncompressed.
        approximate: "none", x Phi(x), or "tanh".
        fmt: of the saved copy: "e4m3", "e5m2", "int8", "auto", or "none" to save x itself.
        group_size: elements of the last dimension that share a scale: 16, 32, 64, 128 or 256. Ignored by `fmt` "none".

    Returns:
        [..., D] of x's dtype. NaN and infinite elements of x have a gradient of NaN and disturb no other.

    Raises:
        ValueError: an unknown `approximate`, `fmt` or `group_size`; a tensor without dimensions.
        TypeError: x is of another dtype.
    """
    return _activation(x, _gelu_kind(approximate), fmt, group_size)


def silu(x: Tensor, *, fmt: str = "e4m3", group_size: int = 128) -> Tensor:
    """`torch.nn.functional.silu` that saves `x` in 8 bits; arguments as `gelu`."""
    return _activation(x, "silu", fmt, group_size)


def swiglu(gate: Tensor, up: Tensor, *, fmt: str = "e4m3", group_size: int = 128) -> Tensor:
    """silu(gate) · up that saves both in 8 bits, and neither silu(gate) nor the product.

    Args:
        gate, up: [..., I] of one shape and dtype. Halves of one tensor are read where they lie; `gated` takes that tensor whole.
        fmt, group_size: as in `gelu`.

    Returns:
        [..., I]. The gradients of gate and up are the halves of one [..., 2I] tensor.
    """
    return _gated(gate, up, "silu", fmt, group_size)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none", *, fmt: str = "e4m3", group_size: int = 128) -> Tensor:
    """gelu(gate, approximate) · up; arguments as `swiglu`."""
    return _gated(gate, up, _gelu_kind(approximate), fmt, group_size)


def gated(packed: Tensor, kind: str, *, gate_first: bool, fmt: str = "e4m3", group_size: int = 128) -> Tensor:
    """f(gate) · up of the two halves of `packed`.

    Args:
        packed: [..., 2I], gate and up side by side as one projection writes them.
        kind: "silu", "gelu" or "gelu_tanh".
        gate_first: whether the gate is the first half (Phi-3, FLUX.2) or the second (diffusers' GEGLU and SwiGLU).
        fmt, group_size: as in `gelu`; groups are made of the halves.

    Returns:
        [..., I]

    Raises:
        ValueError: as `gelu`; an odd last dimension.
    """
    if packed.dim() == 0 or packed.shape[-1] % 2:
        raise ValueError(f"packed holds two halves side by side in its last dimension, which must be even; got shape {tuple(packed.shape)}")
    fmt = _plain_format(packed, fmt, group_size)
    if not _needs_gradient(packed):
        return _OPS.gated_activation(*_halves(packed, gate_first), kind, "none", group_size, False)[0]
    outputs = _GatedPacked.apply(packed, kind, gate_first, fmt, group_size, shared.wants_amax(packed))
    return _offer(outputs, _OPS.gated_activation_from_codes, kind, fmt, group_size)
