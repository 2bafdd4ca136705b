"""A bucket of the CAME step: one launch's tensors, which share device, dtypes, format and phase of the warm-up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bucket import Bucket
from ..state import StepFormat
from . import reference
from .settings import COLUMNS, NUMBERS, TAIL_INTERVAL, CameSettings, TensorNumbers, matrix_sides, tensor_numbers
from .tail import refresh_tails


class CameBucket(Bucket):
    """See `Bucket`; step counts are float32 scalars in host memory."""

    op = "came_8bit"
    columns = COLUMNS

    #: Host copy of the tensors' `lr_max`.
    _lr_max: Tensor | None = None

    @staticmethod
    def _arrays(state: dict[str, Tensor], fmt: StepFormat, param: Tensor) -> dict[str, Tensor]:
        held = Bucket._arrays(state, fmt, param)
        vector = {f"{name}_col": held[name] for name in ("exp_avg_sq", "res") if name in held}
        return {**held, **vector}

    def _extra_columns(self) -> dict[str, list[int]]:
        sides = [matrix_sides(param.shape) or (1, param.numel()) for param in self.params]
        return {"rows": [rows for rows, _ in sides], "cols": [cols for _, cols in sides]}

    def _prepare(self, hyper: CameSettings) -> tuple[list[int], TensorNumbers]:
        """The counts that this step reaches and each tensor's numbers; `lr_max` and outdated tails are brought up to date."""
        steps = [int(count) + 1 for count in torch.stack([state["step"] for state in self.states]).tolist()]
        due = [i for i, t in enumerate(steps) if "tail" in self.arrays[i] and t % TAIL_INTERVAL == 1]
        refresh_tails([self.params[i] for i in due], [self.arrays[i]["tail"] for i in due])
        if self.fmt.rule == "came":
            return steps, tensor_numbers(steps, None, hyper, self.fmt)
        stored = [arrays["lr_max"] for arrays in self.arrays]
        if self._lr_max is None:  # read once: on a GPU every reading would wait for it
            self._lr_max = torch.cat(stored).cpu()
        before = self._lr_max.clone()
        numbers = tensor_numbers(steps, self._lr_max, hyper, self.fmt)
        if not torch.equal(self._lr_max, before):
            torch._foreach_copy_(stored, list(self._lr_max.to(self.device, non_blocking=True).split(1)))
        return steps, numbers

    def _step_cpu(self, hyper: CameSettings) -> None:
        from . import cpu

        _, numbers = self._prepare(hyper)
        cpu.step(self.table, self.fmt, hyper, numbers, param_dtype=self.param_dtype, grad_dtype=self.grad_dtype)

    def _step_gpu(self, hyper: CameSettings) -> None:
        from . import cuda

        # step counts lie in host memory, where it must be known whether this step takes place
        if hyper.found_inf is not None and bool(hyper.found_inf):
            return
        steps, numbers = self._prepare(hyper)
        sides = [matrix_sides(param.shape) or (1, param.numel()) for param in self.params]
        dtypes = {"param_dtype": self.param_dtype, "grad_dtype": self.grad_dtype}
        cuda.step(self.table.on_device(), sides, steps, self.fmt, hyper, numbers, **dtypes)
        torch._foreach_add_([state["step"] for state in self.states], 1)

    def _step_reference(self, hyper: CameSettings, grads: Sequence[Tensor]) -> None:
        steps, numbers = self._prepare(hyper)
        for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            state = {array.name: self.arrays[i][array.name] for array in self.fmt.arrays(param.shape)}
            row = dict(zip(NUMBERS, numbers.rows[i].tolist(), strict=True))
            new_param, new = reference.came_8bit(
                param,
                grad,
                state,
                numbers=row,
                tables=numbers.tables.to(param.device),
                step=steps[i],
                index=self.indices[i],
                fmt=self.fmt,
                hyper=hyper,
            )
            param.copy_(new_param)
            for name, value in new.items():
                state[name].copy_(value)
            self.states[i]["step"].add_(1)
