"""RMSNorm of heads with rotary embedding whose backward pass reads what attention keeps: `coat_kernels::norm_rope` under autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.norm_rope import check_norm_rope_weight
from . import saved
from .first_order import first_order

__all__ = ["check_norm_rope_weight", "norm_rope"]


class _NormRope(torch.autograd.Function):
    """Saves its output, which attention saves too, and four bytes a head."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        first_weight: Tensor | None,
        first_tokens: int,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        interleaved: bool,
    ) -> Tensor:
        y, rstd = torch.ops.coat_kernels.norm_rope(x, weight, first_weight, first_tokens, cos, sin, eps, interleaved)
        ctx.save_for_backward(y, rstd, weight, first_weight, cos, sin)
        ctx.first_tokens, ctx.interleaved = first_tokens, interleaved
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, rstd, weight, first_weight, cos, sin = ctx.saved_tensors
        need_x, need_weight, need_first = ctx.needs_input_grad[:3]
        dx, dweight, dfirst = torch.ops.coat_kernels.norm_rope_backward(
            dy, y, rstd, weight, first_weight, ctx.first_tokens, cos, sin, ctx.interleaved, need_weight or need_first, need_x
        )
        return (
            dx if need_x else None,
            dweight.to(weight.dtype) if need_weight else None,
            dfirst.to(first_weight.dtype) if need_first else None,
            *(None,) * 5,
        )


def norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    first_weight: Tensor | None = None,
    first_tokens: int = 0,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> Tensor:
    """RMSNorm over head_dim, times `weight`, then the rotary embedding: queries or keys, ready for attention.

    It saves its output and four bytes a head. Attention saves the same output, so nothing is kept for this layer where its result goes
    there unchanged; the backward pass rotates back and divides by the weight, which `check_norm_rope_weight` looks at beforehand.

    Args:
        x: [batch, tokens, heads, head_dim]: float32, bfloat16 or float16; float64 on CPUs.
        weight: [head_dim], of any float dtype.
        cos, sin: [tokens, head_dim] or [batch, tokens, head_dim], or both None. An angle stands at both places of its pair.
        first_weight: [head_dim]: weight of the first `first_tokens` tokens (the text of a joint sequence).
        eps: added to the mean square.
        interleaved: pairs are (2i, 2i + 1), as in FLUX; else (i, i + head_dim / 2), as in Llama.

    Returns:
        x's shape and dtype; computed in float32.

    Raises:
        ValueError: shapes that do not match.
        TypeError: an argument is no float tensor.
        BackendUnavailable: no kernel for x's device.
    """
    tensors = (x, weight, first_weight)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        plain: Tensor = torch.ops.coat_kernels.norm_rope(x, weight, first_weight, first_tokens, cos, sin, eps, interleaved)[0]
        return plain
    with saved.attention_operand(x.shape):
        y: Tensor = _NormRope.apply(x, weight, first_weight, first_tokens, cos, sin, eps, interleaved)
    return y
