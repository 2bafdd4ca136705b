"""pytest-benchmark microbenchmarks of the fused AdamW step on the CPU, beside torch's. `make bench-micro` runs them.

Each is measured only after its first steps were found right. 4.2M parameters: 50 to 120 MB, beyond the caches, in milliseconds.
"""

from __future__ import annotations

import pytest

from .checks import Problem
from .entrants import BASELINE, ENTRANTS
from .step_rows import Instance
from .works import BF16, LORA, StepWork

pytest.importorskip("pytest_benchmark")

WORKS = (
    StepWork("4.2M fp32", "cpu", 1, (1 << 22,)),
    StepWork("4.2M bf16", "cpu", 1, (1 << 22,), BF16, BF16),
    StepWork("80 x 16x3072 fp32", "cpu", 80, LORA),
)
OURS = [entrant for entrant in ENTRANTS if entrant is BASELINE or entrant.name.startswith("coat")]


@pytest.mark.parametrize("entrant", OURS, ids=lambda entrant: entrant.name)
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_step(benchmark, work, entrant):
    benchmark.group = f"step, {work.name}"
    instance = Instance.make(entrant, Problem.make(work))
    benchmark.extra_info.update(instance.check())
    benchmark.pedantic(instance.run().timed, rounds=15, warmup_rounds=2)
