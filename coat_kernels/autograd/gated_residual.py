"""residual + gate · x that keeps x in 8 bits, and only where gate is trained: `coat_kernels::gated_residual` under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.row_values import by_segment
from .first_order import first_order


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, gate: Tensor, fmt: str, group_size: int) -> Tensor:
        need_gate = ctx.needs_input_grad[2]
        own = need_gate and fmt != "none"  # uncompressed, x itself serves
        y, codes, scale = torch.ops.coat_kernels.gated_residual(residual, x, gate, fmt, group_size, own)
        ctx.save_for_backward(x if need_gate and not own else codes, scale, gate)
        ctx.settings = fmt, group_size
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, gate = ctx.saved_tensors
        fmt, group_size = ctx.settings
        need_residual, need_x, need_gate = ctx.needs_input_grad[:3]
        dx = dgate = None
        if need_x or need_gate:
            dx, dgate = torch.ops.coat_kernels.gated_residual_backward(dy, codes, scale, gate, fmt, group_size, need_gate, need_x)
        return (
            dy if need_residual else None,
            dx if need_x else None,
            dgate.view(gate.shape).to(gate.dtype) if dgate is not None and need_gate else None,
            None,
            None,
        )


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor, *, fmt: str = "e4m3", group_size: int = 128) -> Tensor:
    """residual + gate · x, as at the end of a diffusion transformer's branches.

    Args:
        residual, x: [..., D], of one shape and dtype: float32, bfloat16 or float16; float64 on CPUs.
        gate: of any float dtype: [D]; or [B, D], [B, 1, D], ... with B the leading dimension of x.
        fmt: of x, kept if gate needs a gradient: "e4m3", "e5m2", "int8", "auto", or "none" to keep x itself.
        group_size: 16, 32, 64, 128 or 256 elements of a row share a scale.

    Returns:
        x's shape and dtype; computed in float32.

    Raises:
        ValueError: shapes that do not match, unknown format, a group size that is not offered.
        TypeError: dtypes that do not agree.
        BackendUnavailable: no kernel for x's device.
    """
    factor = by_segment("gate", gate, x)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (residual, x, factor))):
        plain: Tensor = torch.ops.coat_kernels.gated_residual(residual, x, factor, fmt, group_size, False)[0]
        return plain
    y: Tensor = _GatedResidual.apply(residual, x, factor, fmt, group_size)
    return y
