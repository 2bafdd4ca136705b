"""A bucket: tensors of one device, dtype and state format that a single launch steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor

from ...backends import require_backend
from ..pointer_table import PointerTable, addresses
from . import cpu, reference
from .settings import Hyperparameters, StateFormat


@dataclass
class BucketState:
    """The stored state of a bucket's tensors, parallel lists.

    Args:
        exp_avgs, exp_avg_sqs: uint8 codes, or float32 values for the `float32` codec.
        amaxs: float32 [n_groups, 2], contiguous; empty tensors where nothing is quantized.
        k16s: uint8 [n_groups, 2], contiguous; likewise.
        residuals: int8 for `param_rounding="split"`, else an empty list.
        steps: 0-dim float32.
        indices: each tensor's number in the random generator's key.
    """

    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    amaxs: list[Tensor] = field(default_factory=list)
    k16s: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)


class Bucket:
    """Launch-ready form of parallel lists of parameters, gradients and state.

    Args:
        params, grads: contiguous tensors of one device; each list of one dtype.
        state: their stored state; contiguous, on the same device.
        fmt: how the state is stored.
        use_reference: run the PyTorch reference instead of a kernel.

    Raises:
        BackendUnavailable: no kernel for the device.
    """

    def __init__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], state: BucketState, fmt: StateFormat, *, use_reference: bool = False
    ) -> None:
        self.params, self.state, self.fmt = params, state, fmt
        self.device = self.params[0].device
        self.param_dtype, self.grad_dtype = params[0].dtype, grads[0].dtype
        self.backend = "reference" if use_reference else require_backend("adamw_fp8", self.device)
        rows = len(self.params)
        columns = {
            "param": addresses(self.params),
            "grad": addresses(grads),
            "exp_avg": addresses(state.exp_avgs),
            "exp_avg_sq": addresses(state.exp_avg_sqs),
            "amax": addresses(state.amaxs) if fmt.quantized else [0] * rows,
            "k16": addresses(state.k16s) if fmt.quantized else [0] * rows,
            "residual": addresses(state.residuals) if state.residuals else [0] * rows,
            "step": addresses(state.steps),
            "numel": [p.numel() for p in self.params],
            "index": state.indices,
        }
        self.table = PointerTable(columns, self.device)
        if self.backend == "Triton":
            self._triton = import_module(".triton", __package__)
            self._tiles = self._triton.make_tiles(columns["numel"], fmt.group_size).to(self.device)
            self._corrections = torch.empty(rows, 4, device=self.device)

    def set_params(self, params: Sequence[Tensor]) -> None:
        """Step these tensors from now on: the same shapes and dtype, perhaps at other addresses."""
        self.params = params
        self.table.set_params(params)

    def set_grads(self, grads: Sequence[Tensor]) -> bool:
        """Read these gradients from now on: the same shapes and dtype; whether any lies at a new address.

        The bucket keeps their addresses and not the tensors, which would otherwise live through the next forward pass.
        """
        return self.table.set_grads(grads)

    def step(self, hyper: Hyperparameters, grads: Sequence[Tensor]) -> None:
        """Advance every tensor by one step, in place; nothing changes where `found_inf` is set.

        `grads` are those that the bucket was made with or `set_grads` was last given.
        """
        if self.backend == "Triton":
            table = self.table.on_device()
            dtypes = {"param_dtype": self.param_dtype, "grad_dtype": self.grad_dtype}
            self._triton.step(table, self._tiles, self._corrections, self.fmt, hyper, **dtypes)
        elif hyper.found_inf is None or not bool(hyper.found_inf):
            if self.backend == "C++":
                cpu.step(self.table, self.fmt, hyper, param_dtype=self.param_dtype, grad_dtype=self.grad_dtype)
            else:
                self._step_reference(hyper, grads)

    def _step_reference(self, hyper: Hyperparameters, grads: Sequence[Tensor]) -> None:
        state = self.state
        for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            residual = state.residuals[i] if state.residuals else None
            step = int(state.steps[i].add_(1))
            old = (param, state.exp_avgs[i], state.exp_avg_sqs[i], state.amaxs[i], state.k16s[i], residual)
            new = reference.adamw_fp8(old[0], grad, *old[1:], step=step, index=state.indices[i], fmt=self.fmt, hyper=hyper)
            for target, value in zip(old, new, strict=True):
                if target is not None and value is not None:
                    target.copy_(value)
