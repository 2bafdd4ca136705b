"""pytest-benchmark microbenchmarks of the activation functions on the CPU. `make bench-micro` runs them."""

from __future__ import annotations

import pytest

from .contests.activation import CONTESTS
from .works import BF16, F32, ActivationWork

pytest.importorskip("pytest_benchmark")

CASES = [
    pytest.param(contest.kind, entrant, id=f"{contest.kind}-{entrant.name}")
    for contest in CONTESTS
    for entrant in contest.entrants
    if "cpu" in entrant.devices
]


@pytest.mark.parametrize("dtype", (F32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize(("kind", "entrant"), CASES)
def test_activation(benchmark, kind, entrant, dtype):
    benchmark.group = f"{kind}, 4.2M {str(dtype).removeprefix('torch.')}"
    job = entrant.prepare(ActivationWork("1024x4096", "cpu", (1024, 4096), dtype))
    benchmark.extra_info.update(job.check())
    benchmark.pedantic(job.run, rounds=15, warmup_rounds=2)
