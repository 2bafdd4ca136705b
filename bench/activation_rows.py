"""Rows of kernels that read and write activations: a contest is one piece of work that several entrants do on tensors of one shape.

The contests themselves are in `contests/`, a file for each family of ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .environment import version
from .rows import chosen, dtype_name, measured, reason
from .timing import CLOCKS, OtherLoad, Run, contest, make_copy
from .works import ActivationWork

COPY = "copy"
#: Rounds on a GPU, where every visit is a median of its own.
CUDA_ROUNDS = 5


@dataclass(frozen=True)
class Job:
    """An entrant made ready for a work.

    Args:
        run: what is timed.
        check: runs it once and returns errors for the row; `CheckFailed` if the result is wrong.
    """

    run: Callable[[], object]
    check: Callable[[], dict]


@dataclass(frozen=True)
class Entrant:
    """One way of doing a contest's work.

    Args:
        name: how the row calls it; this package's begin with "coat".
        distribution: whose version the row names, and whose absence makes an error of it.
        prepare: makes the tensors and the job.
        bytes_each: moved for each element of the work, at least; None: the contest's floor.
        devices: where it can run.
    """

    name: str
    distribution: str
    prepare: Callable[[ActivationWork], Job]
    bytes_each: Callable[[ActivationWork], float] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Contest:
    """One piece of work.

    Args:
        kind: its name, "quantize activation".
        floor: bytes that must move for each element: inputs read once, outputs written once.
        entrants: eager PyTorch first; the others are compared with it.
    """

    kind: str
    floor: Callable[[ActivationWork], float]
    entrants: tuple[Entrant, ...]


def _base_row(work: ActivationWork, kind: str, entrant: Entrant) -> dict:
    return {
        "kind": kind,
        "work": f"{kind}, {work.name}",
        "device": work.device,
        "entrant": entrant.name,
        "parameters": work.numel,
        "dtype": dtype_name(work.dtype),
        "clock": work.clock,
    }


def _ready(entrant: Entrant, work: ActivationWork, row: dict) -> Job | None:
    """The entrant's job if it runs here and is right; otherwise the row says why not."""
    try:
        if version(entrant.distribution) is None:
            raise ModuleNotFoundError(f"{entrant.distribution} is not installed (pip install -r requirements/bench.txt)")
        if work.device not in entrant.devices:
            raise RuntimeError(f"{entrant.name} runs on {' and '.join(entrant.devices)} only")
        job = entrant.prepare(work)
        row["check"] = job.check()
    except Exception as error:
        row["error"] = reason(error)
        return None
    return job


def activation_rows(
    work: ActivationWork, contests: tuple[Contest, ...], *, wanted=lambda name: True, rounds: int = 15, budget_s: float = 6.0
) -> list[dict]:
    """A row for each contest and entrant. The copy beside them is of as many bytes as the work's tensor has."""
    rows = []
    if work.device == "cuda":
        rounds = min(rounds, CUDA_ROUNDS)
    for one in contests:
        baseline = one.entrants[0]
        entrants = chosen(f"{one.kind}, {work.name}", one.entrants, baseline, wanted)
        found = [(entrant, _base_row(work, one.kind, entrant)) for entrant in entrants]
        jobs = {entrant.name: job for entrant, row in found if (job := _ready(entrant, work, row))}
        rows += [row for _, row in found]
        if not jobs:
            continue
        copy_run, copy_bytes = make_copy(work.device, max(work.numel * work.dtype.itemsize // 4, 1))
        runs = {name: Run(job.run) for name, job in jobs.items()}
        with OtherLoad() as load:
            times = contest({COPY: copy_run, **runs}, CLOCKS[work.clock], rounds=rounds, budget_s=budget_s)
        for entrant, row in found:
            if entrant.name in jobs:
                mine = times[entrant.name]
                bytes_each = (entrant.bytes_each or one.floor)(work)
                row.update(measured(mine, work.numel, bytes_each, copy_bytes / times[COPY].median))
                row["other_cores"] = load.cores
                if baseline.name in jobs:
                    row["ratio_to_torch_eager"] = mine.ratio_to(times[baseline.name])
    return rows
