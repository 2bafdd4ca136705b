"""Activation checkpointing that keeps what it recomputes from in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .saved import MIN_NUMEL, MIN_ROW, PACKABLE, Packed


class _Boundary:
    """A tensor that crosses into the checkpointed function: the real one for the first run, 8 bits for later ones."""

    def __init__(self, tensor: Tensor, fmt: str, group_size: int) -> None:
        self.tensor: Tensor | None = tensor
        self.requires_grad = tensor.requires_grad
        with torch.no_grad():
            self.codes = Packed.of(tensor.detach(), fmt, group_size)

    def take(self) -> Tensor:
        tensor, self.tensor = self.tensor, None
        if tensor is not None:
            return tensor
        with torch.no_grad():
            again = self.codes()
        return again.requires_grad_(self.requires_grad)


class MemoryEfficientCheckpoint:
    """Recompute a module in the backward pass from inputs kept in 8 bits.

    The forward pass runs once on the real inputs. Of it, only the inputs are kept: large ones that need a gradient in one byte an
    element and a scale for each group, the others (masks, positions, conditioning) as they are. The backward pass runs the function
    again, with the random numbers and the autocast state of the first run (`torch.utils.checkpoint`, non-reentrant), and so gives every
    input and parameter its gradient, exact but for the 8-bit error of the recomputed operands.

    Args:
        function: a module or function.
        fmt: "e4m3", "e5m2", "int8" or "auto".
        group_size: elements a scale: 16, 32, 64, 128 or 256.
    """

    def __init__(self, function: Callable[..., Any], *, fmt: str = "e4m3", group_size: int = 128) -> None:
        self.function = function
        self.fmt, self.group_size = fmt, group_size

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(self.function, *args, fmt=self.fmt, group_size=self.group_size, **kwargs)

    @staticmethod
    def checkpoint(
        function: Callable[..., Any], *args: Any, use_fp8: bool = True, fmt: str = "e4m3", group_size: int = 128, **kwargs: Any
    ) -> Any:
        """`function(*args, **kwargs)`, recomputed in the backward pass.

        Args:
            function: called twice; it must not change its inputs in place.
            args, kwargs: tensors among them may require gradients; tensors inside of other containers are kept as they are.
            use_fp8: keep large inputs that need a gradient in 8 bits; False keeps them as they are, as `torch.utils.checkpoint` does.
            fmt, group_size: of the 8 bits.
        """
        if not use_fp8:
            return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)

        def hold(value: Any) -> Any:
            # what needs no gradient (masks, rotary tables, positions) is often shared between blocks, and must be exact
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or not value.requires_grad:
                return value
            large = value.dtype in PACKABLE and value.numel() >= MIN_NUMEL and value.shape[-1] >= MIN_ROW
            return _Boundary(value, fmt, group_size) if large else value

        held_args, held_kwargs = [hold(value) for value in args], {name: hold(value) for name, value in kwargs.items()}

        def run(_device: Tensor) -> Any:
            return function(*map(_take, held_args), **{name: _take(value) for name, value in held_kwargs.items()})

        # an empty tensor tells the checkpoint whose random state to keep
        device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), torch.device("cpu"))
        return torch_checkpoint(run, torch.empty(0, device=device), use_reentrant=False)


def _take(value: Any) -> Any:
    return value.take() if isinstance(value, _Boundary) else value
