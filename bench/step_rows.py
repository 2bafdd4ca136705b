"""Rows of `optimizer.step()`."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from .checks import Problem, check_optimizer
from .entrants import BASELINE, ENTRANTS, Entrant, state_bytes
from .rows import chosen, dtype_name, measured, reason
from .timing import CLOCKS, OtherLoad, Run, contest, make_copy
from .works import StepWork

COPY = "copy"


@dataclass
class Instance:
    """An entrant set up on the work's tensors."""

    entrant: Entrant
    problem: Problem
    params: list[torch.nn.Parameter]
    optimizer: Optimizer
    grads: list[list[torch.Tensor]]

    @classmethod
    def make(cls, entrant: Entrant, problem: Problem) -> Instance:
        work = problem.work
        params = [torch.nn.Parameter(part) for part in problem.split(problem.start, work.param_dtype)]
        if work.grad_dtype != work.param_dtype:
            for param in params:
                _allow_any_gradient(param)
        sets = 2 if work.fresh_grads else 1
        grads = [problem.split(problem.grad, work.grad_dtype) for _ in range(sets)]
        return cls(entrant, problem, params, entrant.build(params), grads)

    def turn_gradients(self) -> None:
        """Hands the parameters the other set of gradients, where the work keeps two."""
        self.grads.append(self.grads.pop(0))
        for param, grad in zip(self.params, self.grads[0], strict=True):
            param.grad = grad

    def checked_step(self, t: int) -> None:
        for grad, part in zip(self.grads[0], self.problem.split(self.problem.gradient(t), torch.float32), strict=True):
            grad.copy_(part)
        for param, grad in zip(self.params, self.grads[0], strict=True):
            param.grad = grad
        self.optimizer.step()

    def check(self) -> dict:
        """The first steps held against float32 AdamW (`checks.check_optimizer`), and the seconds of the very first."""
        seconds: list[float] = []

        def step(t: int) -> None:
            _synchronize(self.problem.work.device)
            begin = time.perf_counter()
            self.checked_step(t)
            _synchronize(self.problem.work.device)
            seconds.append(time.perf_counter() - begin)

        found = check_optimizer(self.entrant, self.problem, self.params, step)
        return {"check": found, "first_step_seconds": seconds[0]}

    def run(self) -> Run:
        """A timed step with gradients in place."""
        self.turn_gradients()
        if self.problem.work.fresh_grads:
            return Run(self.optimizer.step, before=self.turn_gradients)
        return Run(self.optimizer.step)


def _allow_any_gradient(param: torch.nn.Parameter) -> None:
    if not hasattr(param, "grad_dtype"):
        raise RuntimeError(f"torch {torch.__version__} does not let a gradient differ in dtype from its parameter")
    param.grad_dtype = None


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _base_row(work: StepWork, entrant: Entrant) -> dict:
    return {
        "kind": "step",
        "work": work.name,
        "device": work.device,
        "entrant": entrant.name,
        "parameters": work.numel,
        "tensors": work.count,
        "param_dtype": dtype_name(work.param_dtype),
        "grad_dtype": dtype_name(work.grad_dtype),
        "clock": work.clock,
    }


def _set_up(entrant: Entrant, problem: Problem, row: dict) -> Instance | None:
    """The checked instance, or None with the reason in the row: a peer that cannot run is a row, never the end of the run."""
    if missing := entrant.unavailable(problem.work.device):
        row["skipped"] = missing
        return None
    try:
        instance = Instance.make(entrant, problem)
        row.update(instance.check())
        row["state_bytes_per_parameter"] = state_bytes(instance.optimizer) / problem.work.numel
    except Exception as error:
        row["error"] = reason(error)
        return None
    return instance


def bytes_per_parameter(work: StepWork, state: float) -> float:
    """Bytes one step must move: the parameter and every byte of state read and written, the gradient read."""
    return 2 * work.param_dtype.itemsize + work.grad_dtype.itemsize + 2 * state


def step_rows(work: StepWork, *, wanted=lambda name: True, entrants=ENTRANTS, rounds: int = 15, budget_s: float = 6.0) -> list[dict]:
    """One row an entrant that is `wanted` by "work/entrant"; the baseline runs with any of them, for the ratio."""
    entrants = chosen(work.name, [entrant for entrant in entrants if entrant.works in work.name], BASELINE, wanted)
    if not entrants:
        return []
    problem = Problem.make(work)
    rows = [_base_row(work, entrant) for entrant in entrants]
    instances = [_set_up(entrant, problem, row) for entrant, row in zip(entrants, rows, strict=True)]
    problem.expected.clear()
    copy_run, copy_bytes = make_copy(work.device)
    runs = {instance.entrant.name: instance.run() for instance in instances if instance is not None}
    with OtherLoad() as load:
        times = contest({COPY: copy_run, **runs}, CLOCKS[work.clock], rounds=rounds, budget_s=budget_s)
    copy_rate = copy_bytes / times[COPY].median
    for row in rows:
        if row["entrant"] in runs:
            mine = times[row["entrant"]]
            row.update(measured(mine, work.numel, bytes_per_parameter(work, row["state_bytes_per_parameter"]), copy_rate))
            row["other_cores"] = load.cores
            row["ratio_to_torch_fused"] = mine.ratio_to(times[BASELINE.name]) if BASELINE.name in times else None
    return rows
