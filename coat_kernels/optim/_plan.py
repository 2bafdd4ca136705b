"""Which tensors of a param group are stepped by which launch, kept from step to step while nothing has moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..ops.adamw_fp8 import Bucket, BucketState, Hyperparameters, StateFormat
from ._states import interleaved

_get_grad = attrgetter("grad")


def gradients(params: Sequence[Tensor]) -> list[Any]:
    """The `.grad` of each parameter (`map` halves the cost of a loop: 70 us for 1,000)."""
    return list(map(_get_grad, params))


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def gradient_signature(grad: Tensor | None) -> Any:
    """What must stay the same for a prepared launch to serve."""
    return None if grad is None else (grad.dtype, grad.layout, grad.is_contiguous())


@dataclass
class Launch:
    """A bucket and the positions of its tensors in their param group.

    Args:
        bucket: what the kernel is launched on.
        positions: indices into the group's parameter list.
        states: the state dictionaries of those parameters.
        staged: hand row-major copies to the kernel. Groups follow a tensor's elements, not its memory, so channels-last
            and transposed tensors take this path; so do DTensors, whose local part is a new tensor at every step.
    """

    bucket: Bucket
    positions: list[int]
    states: list[dict[str, Tensor]]
    staged: bool

    def __post_init__(self) -> None:
        self._tracked = [state["exp_avg"] for state in self.states]

    @property
    def states_moved(self) -> bool:
        """Whether someone replaced state tensors (offloading does), so that the table's addresses are stale."""
        return not all(map(is_, [state["exp_avg"] for state in self.states], self._tracked))

    def run(self, params: Sequence[Tensor], grads: Sequence[Any], hyper: Hyperparameters) -> None:
        own_grads = [grads[i] for i in self.positions]
        if not self.staged:
            self.bucket.set_grads(own_grads)
            self.bucket.step(hyper)
            return
        own_params = [local(params[i]) for i in self.positions]
        copies = [p.contiguous() for p in own_params]
        self.bucket.set_params(copies)
        self.bucket.set_grads([local(g).contiguous() for g in own_grads])
        self.bucket.step(hyper)
        for param, copy in zip(own_params, copies, strict=True):
            if copy is not param:
                param.copy_(copy)


@dataclass
class Plan:
    """The launches of a list of parameters; `fits` says whether they still serve."""

    params: list[Tensor]
    grads: list[Any]
    launches: list[Launch]

    def __post_init__(self) -> None:
        self._addresses = list(map(Tensor.data_ptr, self.params))
        self._signature = list(map(gradient_signature, self.grads))

    def fits(self, params: list[Tensor], grads: list[Any]) -> bool:
        if len(params) != len(self.params) or list(map(Tensor.data_ptr, params)) != self._addresses:
            return False
        if not all(map(is_, grads, self.grads)):
            if list(map(gradient_signature, grads)) != self._signature:
                return False
            self.grads = grads
        return not any(launch.states_moved for launch in self.launches)

    def run(self, hyper: Hyperparameters) -> None:
        for launch in self.launches:
            launch.run(self.params, self.grads, hyper)


def build_launch(
    params: Sequence[Tensor],
    grads: Sequence[Any],
    positions: list[int],
    states: list[dict[str, Tensor]],
    indices: list[int],
    fmt: StateFormat,
    *,
    staged: bool,
    use_reference: bool,
) -> Launch:
    """A launch of the tensors at `positions`, which share device, dtypes and format."""
    empty = torch.empty(0)
    bucket_state = BucketState(
        exp_avgs=[s["exp_avg"] for s in states],
        exp_avg_sqs=[s["exp_avg_sq"] for s in states],
        amaxs=[interleaved(s, "amax", fmt) if fmt.quantized else empty for s in states],
        k16s=[interleaved(s, "k16", fmt) if fmt.quantized else empty for s in states],
        residuals=[s["residual"] for s in states] if fmt.param_rounding == "split" else [],
        steps=[s["step"] for s in states],
        indices=indices,
    )
    own_params = [local(params[i]).contiguous() for i in positions]
    own_grads = [local(grads[i]).contiguous() for i in positions]
    return Launch(Bucket(own_params, own_grads, bucket_state, fmt, use_reference=use_reference), positions, states, staged)
