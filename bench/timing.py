"""Interleaved timing: every entrant is measured in every round, so a slow minute of the machine hits all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

Clock = Callable[[Callable[[], object]], float]

#: float32 elements copied for the bandwidth: far beyond any cache.
COPY_NUMEL = {"cpu": 1 << 25, "cuda": 1 << 28}
#: Milliseconds of one visit of `triton.testing.do_bench`.
DO_BENCH_WARMUP_MS, DO_BENCH_MS = 5, 40
#: Cores that others may keep busy before the table says that a row was measured on a shared machine.
QUIET_CORES = 0.15


def wall_cpu(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def wall_cuda(run: Callable[[], object]) -> float:
    """From an idle device until the device is idle again."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def device_cuda(run: Callable[[], object]) -> float:
    """Time between two events on the stream, L2 flushed before each (`triton.testing.do_bench`)."""
    from triton.testing import do_bench

    return do_bench(run, warmup=DO_BENCH_WARMUP_MS, rep=DO_BENCH_MS, return_mode="median") / 1e3


CLOCKS: dict[str, Clock] = {"wall_cpu": wall_cpu, "wall_cuda": wall_cuda, "device_cuda": device_cuda}


@dataclass(frozen=True)
class Run:
    """What the clock sees, and what is done before it without being timed."""

    timed: Callable[[], object]
    before: Callable[[], object] = lambda: None


@dataclass
class Times:
    """Seconds of one entrant, by round."""

    by_round: dict[int, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.by_round.values())

    @property
    def quartiles(self) -> list[float]:
        values = list(self.by_round.values())
        if len(values) < 2:
            return [values[0], values[0]]
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return [low, high]

    def ratio_to(self, other: Times) -> float:
        """Median over the rounds both ran in of this time over the other's."""
        return statistics.median(seconds / other.by_round[i] for i, seconds in self.by_round.items() if i in other.by_round)


def _visit(run: Run, clock: Clock) -> float:
    run.before()
    return clock(run.timed)


def contest(runs: Mapping[str, Run], clock: Clock, *, rounds: int, budget_s: float) -> dict[str, Times]:
    """Time every run in turn for `rounds` rounds.

    An entrant that would spend more than `budget_s` in all rounds sits some of them out, evenly spread; at least three
    remain where one run takes under a third of the budget, and one in any case.
    """
    times = {name: Times() for name in runs}
    stride = {}
    names = list(runs)
    for name in names:
        once = _visit(runs[name], clock)
        affordable = max(1, min(rounds, int(budget_s / max(once, 1e-9))))
        stride[name] = -(-rounds // affordable)
    for i in range(rounds):
        # the starting point moves on, so that no entrant always runs behind the same one
        start = i % len(names)
        for name in names[start:] + names[:start]:
            if i % stride[name] == 0:
                times[name].by_round[i] = _visit(runs[name], clock)
    return times


class OtherLoad:
    """Cores that other processes kept busy while the block ran: `.cores`, None where `/proc/stat` is not to be had.

    On two cores that were shared with others torch's barriers waited for threads that were not running: its step took 5 to 20
    times as long, and every ratio to it looked too good.
    """

    cores: float | None = None

    def __enter__(self) -> OtherLoad:
        self._begin = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        end = self._read()
        if self._begin and end:
            busy, mine, wall = (after - before for after, before in zip(end, self._begin, strict=True))
            self.cores = round(max(0.0, busy - mine) / max(wall, 1e-3), 2)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        except (OSError, ValueError):
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal
        busy = (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        return busy, time.process_time(), time.perf_counter()


def make_copy(device: str, numel: int | None = None) -> tuple[Run, int]:
    """A device-to-device copy far larger than the caches, and the bytes it moves (read and written)."""
    numel = numel or COPY_NUMEL[device]
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)
    return Run(lambda: target.copy_(source)), 2 * source.numel() * source.element_size()
