"""The launch object of the fused FP8 AdamW step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..bucket import Bucket
from . import cpu, reference
from .settings import COLUMNS, Hyperparameters, StateFormat


@dataclass
class StateLists:
    """The stored state of parallel tensors as the op takes it.

    Args:
        exp_avgs, exp_avg_sqs: as their codecs store them: `Codec.array_dtype` and `codes_shape`.
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

    def states(self, fmt: StateFormat) -> list[dict[str, Tensor]]:
        """The same tensor by tensor, under the names of `StateFormat.arrays`."""
        states = []
        for i, step in enumerate(self.steps):
            state = {"step": step, "exp_avg": self.exp_avgs[i], "exp_avg_sq": self.exp_avg_sqs[i]}
            for column, moment in enumerate(fmt.moments):
                if moment.codec.quantized:
                    state[f"{moment.name}_amax"] = self.amaxs[i][:, column]
                    state[f"{moment.name}_k16"] = self.k16s[i][:, column]
            if self.residuals:
                state["residual"] = self.residuals[i]
            states.append(state)
        return states


class AdamWFP8Bucket(Bucket):
    """`Bucket` of `adamw_fp8_`; its format is a `StateFormat`."""

    op = "adamw_fp8"
    columns = COLUMNS[2:-3]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.backend == "Triton":
            self._triton = import_module(".triton", __package__)
            sizes = [param.numel() for param in self.params]
            self._tiles = self._triton.make_tiles(sizes, self.fmt.group_size).to(self.device)
            self._corrections = torch.empty(len(sizes), 4, device=self.device)

    def _step_cpu(self, hyper: Hyperparameters) -> None:
        cpu.step(self.table, self.fmt, hyper, param_dtype=self.param_dtype, grad_dtype=self.grad_dtype)

    def _step_gpu(self, hyper: Hyperparameters) -> None:
        dtypes = {"param_dtype": self.param_dtype, "grad_dtype": self.grad_dtype}
        self._triton.step(self.table.on_device(), self._tiles, self._corrections, self.fmt, hyper, **dtypes)

    def _step_reference(self, hyper: Hyperparameters, grads: Sequence[Tensor]) -> None:
        for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            held = self.arrays[i]
            absent = grad.new_empty(0)  # metadata where nothing is quantized
            old: list[Any] = [param, *(held.get(name, absent) for name in ("exp_avg", "exp_avg_sq", "amax", "k16"))]
            step = int(self.states[i]["step"].add_(1))
            numbers: dict[str, Any] = {"step": step, "index": self.indices[i], "fmt": self.fmt, "hyper": hyper}
            *new, residual = reference.adamw_fp8(param, grad, old[1], old[2], old[3], old[4], held.get("residual"), **numbers)
            for target, value in zip(old, new, strict=True):
                target.copy_(value)
            if residual is not None:
                held["residual"].copy_(residual)
