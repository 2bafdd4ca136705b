"""What every backend of the activation functions knows: the functions by name, and the layout of their inputs."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

KINDS = ("gelu_tanh", "gelu", "silu")
KIND_INDEX = {kind: i for i, kind in enumerate(KINDS)}


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` [..., D], or a contiguous copy of it, whose rows lie at one distance from each other, and that distance in elements."""
    width = x.shape[-1]
    outer = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    even = all(step == inner_step * inner for (_, step), (inner, inner_step) in pairwise(outer))
    stride = outer[-1][1] if outer else width
    if even and stride >= width and (x.stride(-1) == 1 or width == 1):
        return x, stride
    return x.contiguous(), width
