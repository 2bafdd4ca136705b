"""The gate: a number is taken only after the very tensors that are timed were found right in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .entrants import Entrant
from .works import StepWork

Oracle = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

#: The first step, where no codec has lost anything yet, and one that has seen several different gradients.
CHECKED_STEPS = (1, 5)
#: After several steps half of the elements must have moved within this of float32 AdamW. Codes of e4m3 lie 2^-4 apart at
#: most, half of that rounds, and the moments' errors add up; an 8-bit state that was not carried over misses by 30 % and more.
QUANTIZED_TOLERANCE = 0.08
#: float32 states differ by the rounding of parameters of 0.1 and of the order of operations.
FLOAT32_TOLERANCE = 2e-3
#: bfloat16 parameters: half a unit in the last place each step, 2.4e-4 at 0.1, beside steps of 1e-2.
BFLOAT16_TOLERANCE = 0.05


class CheckFailed(AssertionError):
    """The entrant does not compute what it says; its time would mean nothing."""


@dataclass
class Problem:
    """Parameters, gradients and what an optimizer makes of them in float32.

    Flat float32 vectors on the work's device, already rounded to the dtypes the work stores.
    """

    work: StepWork
    start: Tensor  # [numel]
    grad: Tensor  # [numel]
    expected: dict[Oracle, dict[int, Tensor]]  # step -> [numel]

    @classmethod
    def make(cls, work: StepWork, seed: int = 0) -> Problem:
        generator = torch.Generator(work.device).manual_seed(seed)
        normal = {"device": work.device, "generator": generator}
        start = torch.randn(work.numel, **normal).mul_(0.1).to(work.param_dtype).to(torch.float32)
        grad = torch.randn(work.numel, **normal).mul_(1e-3).to(work.grad_dtype).to(torch.float32)
        return cls(work, start, grad, {})

    def gradient(self, step: int) -> Tensor:
        """Another gradient for every step: with a constant one AdamW does not depend on its betas."""
        return torch.roll(self.grad, step - 1)

    def expected_of(self, oracle: Oracle) -> dict[int, Tensor]:
        """The parameters after each of `CHECKED_STEPS`, kept for the next entrant that asks for the same."""
        if oracle not in self.expected:
            params = [torch.nn.Parameter(part) for part in self.split(self.start, torch.float32)]
            optimizer = oracle(params)
            kept = self.expected[oracle] = {}
            for step in range(1, max(CHECKED_STEPS) + 1):
                for param, grad in zip(params, self.split(self.gradient(step), torch.float32), strict=True):
                    param.grad = grad
                optimizer.step()
                if step in CHECKED_STEPS:
                    kept[step] = _flat(params)
        return self.expected[oracle]

    def split(self, flat: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """`flat` as the work's tensors, each in its own storage."""
        each = flat.numel() // self.work.count
        return [part.to(dtype, copy=True).view(self.work.shape) for part in flat.split(each)]


def _flat(params: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in params]).to(torch.float32)


def _errors(got: Tensor, want: Tensor, start: Tensor) -> tuple[float, float]:
    """Relative L2 error of the way travelled, and the median over elements."""
    way = want - start
    off = got - want
    l2 = (off.norm() / way.norm()).item()
    # torch.quantile refuses more than 2^24 elements; every element's neighbourhood is alike, so a stride is a fair sample
    stride = max(1, off.numel() >> 22)
    ratio = (off[::stride].abs() / way[::stride].abs().clamp(min=torch.finfo(torch.float32).tiny)).nan_to_num(torch.inf)
    return l2, ratio.median().item()


def check_optimizer(entrant: Entrant, problem: Problem, params: list[torch.nn.Parameter], step) -> dict:
    """Runs the entrant's first steps against the reference.

    Args:
        params: the entrant's parameters, at `problem.start`.
        step: advances the optimizer once, with `problem.gradient(t)` as gradients for t = 1, 2, ...

    Returns:
        The errors, for the row.

    Raises:
        CheckFailed: an error is over its tolerance; the message says which and by how much.
    """
    bfloat16 = problem.work.param_dtype == torch.bfloat16
    found = {}
    for t in range(1, max(CHECKED_STEPS) + 1):
        step(t)
        if t not in CHECKED_STEPS:
            continue
        l2, median = _errors(_flat(params), problem.expected_of(entrant.oracle)[t], problem.start)
        found[f"step{t}_l2"], found[f"step{t}_median"] = l2, median
        if bfloat16:
            error, limit = (l2 if t == 1 else median), BFLOAT16_TOLERANCE
        elif t == 1:
            error, limit = l2, entrant.first_step_tolerance
        else:
            error, limit = (median, QUANTIZED_TOLERANCE) if entrant.quantized else (l2, FLOAT32_TOLERANCE)
        if bfloat16 and t > 1:
            limit += QUANTIZED_TOLERANCE
        if not error <= limit:
            raise CheckFailed(f"update of step {t} is off by {error:.3g} of what float32 gives, {limit:.3g} allowed")
    return found
