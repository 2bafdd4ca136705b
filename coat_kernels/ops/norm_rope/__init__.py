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

from .._library import LIBRARY
from ..row_values import backend_of, check_device, check_rows, check_same, contiguous, wide_dtype
from . import cpu, reference

LIBRARY.define(
    "norm_rope(Tensor x, Tensor weight, Tensor? first_weight, SymInt first_tokens, Tensor? cos, Tensor? sin, float eps, bool interleaved) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "norm_rope_backward(Tensor dy, Tensor y, Tensor rstd, Tensor weight, Tensor? first_weight, SymInt first_tokens, Tensor? cos, "
    "Tensor? sin, bool interleaved, bool need_weight, bool need_x=True) -> (Tensor, Tensor, Tensor)"
)


def check_norm_rope(
    x: Tensor, weight: Tensor, first_weight: Tensor | None, first_tokens: int, cos: Tensor | None, sin: Tensor | None
) -> None:
    """The checks that the ops and their fakes share."""
    check_rows("x", x)
    if x.ndim != 4:
        raise ValueError(f"x must be [batch, tokens, heads, head_dim], got shape {tuple(x.shape)}")
    batch, tokens, _, head_dim = x.shape
    if (first_weight is None and first_tokens != 0) or not 0 <= first_tokens <= tokens:
        raise ValueError(f"first_tokens={first_tokens} needs first_weight and at most the {tokens} tokens of x; pass 0 where there is none")
    for name, tensor in (("weight", weight), ("first_weight", first_weight)):
        if tensor is not None and (tensor.shape != (head_dim,) or not tensor.is_floating_point()):
            raise ValueError(f"{name} must be a float tensor [{head_dim}], got {tensor.dtype} {tuple(tensor.shape)}")
    if (cos is None) != (sin is None):
        raise ValueError("pass both cos and sin, or neither for a norm without rotation")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor is None:
            continue
        if tuple(tensor.shape) not in ((tokens, head_dim), (1, tokens, head_dim), (batch, tokens, head_dim)):
            raise ValueError(f"{name} must be [{tokens}, {head_dim}] or [{batch}, {tokens}, {head_dim}], got {tuple(tensor.shape)}")
        if head_dim % 2:
            raise ValueError(f"a rotation needs heads of an even size, got {head_dim}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {tensor.dtype}")
    for name, tensor in (("weight", weight), ("first_weight", first_weight), ("cos", cos), ("sin", sin)):
        if tensor is not None:
            check_device(name, tensor, "x", x)
    if cos is not None and sin is not None and (cos.shape != sin.shape or cos.dtype != sin.dtype):
        raise ValueError(f"cos {cos.dtype} {tuple(cos.shape)} and sin {sin.dtype} {tuple(sin.shape)} must agree in shape and dtype")


def check_norm_rope_backward(dy: Tensor, y: Tensor, rstd: Tensor) -> None:
    """What the backward op and its fake check beside `check_norm_rope`."""
    check_same("dy", dy, "y", y)
    if rstd.shape != y.shape[:-1]:
        raise ValueError(f"rstd must have one entry a head, shape {tuple(y.shape[:-1])}, got {tuple(rstd.shape)}")


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


def _norm_rope(
    x: Tensor,
    weight: Tensor,
    first_weight: Tensor | None,
    first_tokens: int,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    check_norm_rope(x, weight, first_weight, first_tokens, cos, sin)
    return _backend(x).norm_rope(
        x.contiguous(),
        weight.contiguous(),
        contiguous(first_weight),
        contiguous(cos),
        contiguous(sin),
        first_tokens=first_tokens,
        eps=eps,
        interleaved=interleaved,
    )


def _norm_rope_fake(
    x: Tensor,
    weight: Tensor,
    first_weight: Tensor | None,
    first_tokens: int,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    check_norm_rope(x, weight, first_weight, first_tokens, cos, sin)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype))


def _norm_rope_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    check_norm_rope(y, weight, first_weight, first_tokens, cos, sin)
    check_norm_rope_backward(dy, y, rstd)
    return _backend(dy).norm_rope_backward(
        dy.contiguous(),
        y.contiguous(),
        rstd.contiguous(),
        weight.contiguous(),
        contiguous(first_weight),
        contiguous(cos),
        contiguous(sin),
        first_tokens=first_tokens,
        interleaved=interleaved,
        need_weight=need_weight,
        need_x=need_x,
    )


def _norm_rope_backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor]:
    check_norm_rope(y, weight, first_weight, first_tokens, cos, sin)
    check_norm_rope_backward(dy, y, rstd)
    wide = wide_dtype(dy.dtype)
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_x else dy.new_empty(0)
    dweight = weight.new_empty(weight.shape if need_weight else 0, dtype=wide)
    return dx, dweight, weight.new_empty(weight.shape if need_weight and first_weight is not None else 0, dtype=wide)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("norm_rope", _norm_rope, _key)
    LIBRARY.impl("norm_rope_backward", _norm_rope_backward, _key)
torch.library.register_fake("coat_kernels::norm_rope", _norm_rope_fake, lib=LIBRARY)
torch.library.register_fake("coat_kernels::norm_rope_backward", _norm_rope_backward_fake, lib=LIBRARY)
