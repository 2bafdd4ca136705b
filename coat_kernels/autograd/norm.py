"""RMSNorm, LayerNorm and LayerNorm + modulate that keep 8 bits for the backward pass: `coat_kernels::norm` under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.row_values import by_segment
from . import saved, shared
from .first_order import first_order


class _Norm(torch.autograd.Function):
    """x, gain, shift -> y, and the codes and scales of xhat, which carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        center: bool,
        plus_one: bool,
        eps: float,
        fmt: str,
        group_size: int,
        amax: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, codes, scale, rstd, y_amax = torch.ops.coat_kernels.norm(x, gain, shift, center, plus_one, eps, fmt, group_size, amax)
        ctx.save_for_backward(codes, scale, rstd, gain)
        ctx.mark_non_differentiable(codes, scale, y_amax)
        ctx.set_materialize_grads(False)
        ctx.settings = center, plus_one, fmt, group_size
        ctx.gain_shape, ctx.shift_shape = None if gain is None else gain.shape, None if shift is None else shift.shape
        ctx.gain_dtype, ctx.shift_dtype = None if gain is None else gain.dtype, None if shift is None else shift.dtype
        return y, codes, scale, y_amax

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        none = (None,) * 6
        if dy is None:
            return None, None, None, *none
        codes, scale, rstd, gain = ctx.saved_tensors
        center, plus_one, fmt, group_size = ctx.settings
        need_x, need_gain, need_shift = ctx.needs_input_grad[:3]
        segments = _segments(ctx.gain_shape) if ctx.gain_shape is not None else _segments(ctx.shift_shape)
        dx, dgain, dshift = torch.ops.coat_kernels.norm_backward(
            dy, codes, scale, rstd, gain, center, plus_one, fmt, group_size, segments, need_gain, need_shift, need_x
        )
        return (
            dx if need_x else None,
            dgain.view(ctx.gain_shape).to(ctx.gain_dtype) if need_gain else None,
            dshift.view(ctx.shift_shape).to(ctx.shift_dtype) if need_shift else None,
            *none,
        )


def _segments(shape: torch.Size | None) -> int:
    return 1 if shape is None or len(shape) == 1 else shape[0]


def norm(
    x: Tensor,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    center: bool,
    plus_one: bool = False,
    eps: float = 1e-6,
    fmt: str = "e4m3",
    group_size: int = 128,
) -> Tensor:
    """Normalize the last dimension: xhat · (gain + 1 if plus_one) + shift, xhat = (x - mean if center) / sqrt(variance + eps).

    For the backward pass it keeps xhat in `fmt`, one byte an element and four a group, and four bytes a row. A saved-tensor hook can
    rebuild the output from them (`saved.offer`), so that what reads it need not keep it.

    Args:
        x: [..., D]: float32, bfloat16 or float16; float64 on CPUs.
        gain, shift: of any float dtype: [D]; or [B, D], [B, 1, D], ... with B the leading dimension of x.
        center: subtract the mean (LayerNorm) or not (RMSNorm).
        plus_one: gain counts from one: a modulation, or Gemma's weights.
        eps: added to the variance (RMSNorm: to the mean square).
        fmt: "e4m3", "e5m2", "int8", "auto", or "none" to keep xhat in x's dtype.
        group_size: 16, 32, 64, 128 or 256 elements of a row share a scale.

    Returns:
        [..., D] in x's dtype; computed in float32.

    Raises:
        ValueError: shapes that do not match, unknown format, a group size that is not offered.
        TypeError: x or a factor is no float tensor.
        BackendUnavailable: no kernel for x's device.
    """
    if gain is not None:
        gain = by_segment("gain", gain, x)
    if shift is not None:
        shift = by_segment("shift", shift, x)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gain, shift))
    if not needed:
        y: Tensor = torch.ops.coat_kernels.norm(x, gain, shift, center, plus_one, eps, fmt, group_size, False, False)[0]
        return y
    y, codes, scale, y_amax = _Norm.apply(x, gain, shift, center, plus_one, eps, fmt, group_size, shared.wants_amax(x))
    if not torch.compiler.is_compiling():
        shared.offer_amax(y, y_amax)
        kept = [None if factor is None else factor.detach() for factor in (gain, shift)]
        dtype = y.dtype
        saved.offer(y, lambda: torch.ops.coat_kernels.norm_from_codes(codes, scale, *kept, plus_one, fmt, group_size, dtype))
    return y


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, plus_one: bool = False, fmt: str = "e4m3", group_size: int = 128
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; `norm` says the rest."""
    return norm(x, weight, center=False, plus_one=plus_one, eps=eps, fmt=fmt, group_size=group_size)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    fmt: str = "e4m3",
    group_size: int = 128,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension; `norm` says the rest."""
    return norm(x, weight, bias, center=True, eps=eps, fmt=fmt, group_size=group_size)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, fmt: str = "e4m3", group_size: int = 128) -> Tensor:
    """layer_norm(x) · (1 + scale) + shift, scale and shift [B, D] or [B, 1, D] for x [B, ..., D]; `norm` says the rest."""
    return norm(x, scale, shift, center=True, plus_one=True, eps=eps, fmt=fmt, group_size=group_size)
