"""RMSNorm of each head, then rotary embedding: `coat_kernels::norm_rope` and `coat_kernels::norm_rope_backward`.

    n = x · rstd · weight,   rstd = 1 / sqrt(mean(x²) + eps)          over the head's dh elements of x [B, T, H, dh]
    y = (a · cos - b · sin, b · cos + a · sin)                        for each pair (a, b) of n

The pairs are neighbours (2i, 2i + 1), as in FLUX, or, not interleaved, the two halves of a head, as in Llama. The backward pass reads
y, which attention keeps anyway, and rstd: n = y rotated back, x · rstd = n / weight. The first `first_tokens` tokens of a joint
sequence may have a weight of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._library import LIBRARY, register
from ..row_values import backend_of, check_device, check_rows, check_same, contiguous, wide_dtype
from . import cpu, reference
from .factors import HeadFactors

LIBRARY.define(
    "norm_rope(Tensor x, Tensor weight, Tensor? first_weight, SymInt first_tokens, Tensor? cos, Tensor? sin, float eps, bool interleaved) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "norm_rope_backward(Tensor dy, Tensor y, Tensor rstd, Tensor weight, Tensor? first_weight, SymInt first_tokens, Tensor? cos, "
    "Tensor? sin, bool interleaved, bool need_weight, bool need_x=True) -> (Tensor, Tensor, Tensor)"
)


def _check_heads(x: Tensor, factors: HeadFactors) -> None:
    check_rows("x", x)
    if x.ndim != 4:
        raise ValueError(f"x must be [batch, tokens, heads, head_dim], got shape {tuple(x.shape)}")
    batch, tokens, _, head_dim = x.shape
    if (factors.first_weight is None and factors.first_tokens != 0) or not 0 <= factors.first_tokens <= tokens:
        raise ValueError(
            f"first_tokens={factors.first_tokens} needs first_weight and at most the {tokens} tokens of x; pass 0 where there is none"
        )
    weights = (("weight", factors.weight), ("first_weight", factors.first_weight))
    for name, tensor in weights:
        if tensor is not None and (tensor.shape != (head_dim,) or not tensor.is_floating_point()):
            raise ValueError(f"{name} must be a float tensor [{head_dim}], got {tensor.dtype} {tuple(tensor.shape)}")
    cos, sin = factors.cos, factors.sin
    if (cos is None) != (sin is None):
        raise ValueError("pass both cos and sin, or neither for a norm without rotation")
    tables = (("cos", cos), ("sin", sin))
    for name, tensor in tables:
        if tensor is None:
            continue
        if tuple(tensor.shape) not in ((tokens, head_dim), (1, tokens, head_dim), (batch, tokens, head_dim)):
            raise ValueError(f"{name} must be [{tokens}, {head_dim}] or [{batch}, {tokens}, {head_dim}], got {tuple(tensor.shape)}")
        if head_dim % 2:
            raise ValueError(f"a rotation needs heads of an even size, got {head_dim}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {tensor.dtype}")
    for name, tensor in (*weights, *tables):
        if tensor is not None:
            check_device(name, tensor, "x", x)
    if cos is not None and sin is not None and (cos.shape != sin.shape or cos.dtype != sin.dtype):
        raise ValueError(f"cos {cos.dtype} {tuple(cos.shape)} and sin {sin.dtype} {tuple(sin.shape)} must agree in shape and dtype")


def check_norm_rope_weight(weight: Tensor, name: str = "weight") -> None:
    """Refuse a weight that the backward pass cannot divide by: it reads x · rstd from y as y / weight.

    Raises:
        ValueError: an element is smaller than 2^-10 of the largest, or not finite.
    """
    magnitude = weight.detach().abs().float()
    finite = torch.isfinite(magnitude)
    largest = torch.where(finite, magnitude, 0).max()
    bad = ~((magnitude >= largest * 2.0**-10) & (magnitude > 0) & finite)
    if bool(bad.any()):
        raise ValueError(
            f"{name} has {int(bad.sum())} of {weight.numel()} elements under 2^-10 of its largest, {largest.item():g}, or not finite: "
            "norm_rope's backward pass divides by them. Use rms_norm and a rotation of its own here: it keeps 8 bits of its input"
        )


def _backend(tensor: Tensor) -> Any:
    return backend_of("norm_rope", tensor, reference, cpu)


def _norm_rope_arguments(
    x: Tensor,
    weight: Tensor,
    first_weight: Tensor | None,
    first_tokens: int,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Any, ...]:
    factors = HeadFactors(weight, first_weight, first_tokens, cos, sin, interleaved)
    _check_heads(x, factors)
    return x, factors, eps


def _norm_rope(x: Tensor, factors: HeadFactors, eps: float) -> tuple[Tensor, Tensor]:
    return _backend(x).norm_rope(x.contiguous(), factors.each(contiguous), eps)


def _norm_rope_fake(x: Tensor, factors: HeadFactors, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype))


def _norm_rope_backward_arguments(
    dy: Tensor,
    y: Tensor,
    rstd: Tensor,
    weight: Tensor,
    first_weight: Tensor | None,
    first_tokens: int,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    need_weight: bool,
    need_x: bool = True,
) -> tuple[Any, ...]:
    factors = HeadFactors(weight, first_weight, first_tokens, cos, sin, interleaved)
    _check_heads(y, factors)
    check_same("dy", dy, "y", y)
    if rstd.shape != y.shape[:-1]:
        raise ValueError(f"rstd must have one entry a head, shape {tuple(y.shape[:-1])}, got {tuple(rstd.shape)}")
    return dy, y, rstd, factors, need_weight, need_x


def _norm_rope_backward(
    dy: Tensor, y: Tensor, rstd: Tensor, factors: HeadFactors, need_weight: bool, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    given = dy.contiguous(), y.contiguous(), rstd.contiguous(), factors.each(contiguous)
    return _backend(dy).norm_rope_backward(*given, need_weight=need_weight, need_x=need_x)


def _norm_rope_backward_fake(
    dy: Tensor, y: Tensor, rstd: Tensor, factors: HeadFactors, need_weight: bool, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_x else dy.new_empty(0)
    dweight, dfirst_weight = (
        dy.new_empty(factors.weight.shape if need else 0, dtype=wide_dtype(dy.dtype))
        for need in (need_weight, need_weight and factors.first_weight is not None)
    )
    return dx, dweight, dfirst_weight


register("norm_rope", _norm_rope_arguments, _norm_rope, _norm_rope_fake)
register("norm_rope_backward", _norm_rope_backward_arguments, _norm_rope_backward, _norm_rope_backward_fake)
