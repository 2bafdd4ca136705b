"""Backward passes that have no derivative of their own say so when one is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MESSAGE = (
    b"this function of coat_kernels has no second derivative: a gradient penalty or create_graph=True needs the plain modules; "
    b"convert the model without the layers that it goes through (filter_fn), or not at all"
)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For `Function.backward`: what it returns raises if it is differentiated.

    torch's `once_differentiable` does so only where the incoming gradient itself needs one; elsewhere the second derivative of a
    penalty would silently be zero.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # no create_graph
            return outputs
        delayed = torch._C._functions.DelayedError(_MESSAGE, len(outputs))
        needing = [out.detach().requires_grad_() if isinstance(out, Tensor) else out for out in outputs]
        return tuple(delayed(*needing))

    return wrapper
