"""The launch object of the blockwise 8-bit step."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..bucket import Bucket
from . import cpu, reference
from .settings import COLUMNS, Hyperparameters8bit


class Step8bitBucket(Bucket):
    """`Bucket` of `step_8bit_`; its format is a `BlockwiseFormat`. For "momentum" `params` are the buffers that receive the updates."""

    op = "step_8bit"
    columns = COLUMNS[2:-3]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.backend == "CUDA":
            self._cuda = import_module(".cuda", __package__)
            sizes = [param.numel() for param in self.params]
            self._tiles = self._cuda.make_tiles(sizes, self.fmt.block_size).to(self.device)
            self._corrections = torch.empty(len(sizes), 4, device=self.device)

    def _step_cpu(self, hyper: Hyperparameters8bit) -> None:
        cpu.step(self.table, self.fmt, hyper, param_dtype=self.param_dtype, grad_dtype=self.grad_dtype)

    def _step_gpu(self, hyper: Hyperparameters8bit) -> None:
        dtypes = {"param_dtype": self.param_dtype, "grad_dtype": self.grad_dtype}
        self._cuda.step(self.table.on_device(), self._tiles, self._corrections, self.fmt, hyper, **dtypes)

    def _step_reference(self, hyper: Hyperparameters8bit, grads: Sequence[Tensor]) -> None:
        for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            held = self.arrays[i]
            step = int(self.states[i]["step"].add_(1))
            old = [held.get(name) for name in self.columns]
            new = reference.step_8bit(param, grad, held["exp_avg"], *old[1:], step=step, index=self.indices[i], fmt=self.fmt, hyper=hyper)
            for target, value in zip((param, *old), new, strict=True):
                if target is not None and value is not None:
                    target.copy_(value)
