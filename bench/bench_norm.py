"""pytest-benchmark microbenchmarks of norms on the CPU. `make bench-micro` runs them."""

from __future__ import annotations

import pytest

from .contests.norm import NORM
from .works import BF16, F32, ActivationWork

pytest.importorskip("pytest_benchmark")

CASES = [pytest.param(contest.kind, entrant, id=f"{contest.kind}-{entrant.name}") for contest in NORM for entrant in contest.entrants]


@pytest.mark.parametrize("dtype", (F32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize(("kind", "entrant"), CASES)
def test_norm(benchmark, kind, entrant, dtype):
    benchmark.group = f"{kind}, 1152x3072 {str(dtype).removeprefix('torch.')}"
    job = entrant.prepare(ActivationWork("1152x3072", "cpu", (1152, 3072), dtype))
    benchmark.extra_info.update(job.check())
    benchmark.pedantic(job.run, rounds=15, warmup_rounds=2)
