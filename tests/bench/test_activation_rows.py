"""Rows of kernels on activations: every contest runs on a small work, and what is wrong or missing gets no number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.activation_rows import Contest, Entrant, Job, activation_rows
from bench.checks import CheckFailed
from bench.contests import CONTESTS
from bench.contests.activation_quant import check_round_trip
from bench.works import ACTIVATION_WORKS, ActivationWork

SMALL = ActivationWork("small", "cpu", (64, 256))
EAGER = CONTESTS[0].entrants[0]


def rows_of(*entrants: Entrant, kind: str = "some work") -> dict[str, dict]:
    rows = activation_rows(SMALL, (Contest(kind, lambda work: 3.0, entrants),), rounds=3, budget_s=1.0)
    return {row["entrant"]: row for row in rows}


@pytest.mark.parametrize("contest", CONTESTS, ids=lambda contest: contest.kind)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_this_package_passes_the_gate(contest: Contest, device: str) -> None:
    """Inductor's compilation would take most of a minute."""
    work = replace(SMALL, device=device, clock="wall_cpu" if device == "cpu" else "wall_cuda")
    rows = activation_rows(work, (contest,), wanted=lambda name: "inductor" not in name, rounds=3, budget_s=1.0)
    for row in rows:
        if row["entrant"].startswith(("coat", "torch")):
            assert "error" not in row, row
            assert row["gb_per_second"] == pytest.approx(row["bytes_per_parameter"] * work.numel / row["seconds"] / 1e9)
    assert any(row["entrant"].startswith("coat") and row["ratio_to_torch_eager"] > 0 for row in rows)


def test_contests_have_names_of_their_own() -> None:
    kinds = [contest.kind for contest in CONTESTS]
    assert len(set(kinds)) == len(kinds)
    for contest in CONTESTS:
        names = [entrant.name for entrant in contest.entrants]
        assert names[0].startswith("torch eager") and len(set(names)) == len(names)
        for work in ACTIVATION_WORKS:
            assert contest.floor(work) > 0


def fails(work: ActivationWork) -> Job:
    def check() -> dict:
        raise CheckFailed("off by 7")

    return Job(lambda: None, check)


def test_what_is_wrong_or_missing_has_no_number() -> None:
    rows = rows_of(
        EAGER,
        Entrant("wrong", "torch", fails),
        Entrant("absent", "no-such-distribution", fails),
        Entrant("elsewhere", "torch", fails, devices=("cuda",)),
    )
    assert rows["torch eager"]["seconds"] > 0
    assert rows["wrong"]["error"] == "CheckFailed: off by 7"
    assert "no-such-distribution is not installed" in rows["absent"]["error"]
    assert "elsewhere runs on cuda only" in rows["elsewhere"]["error"]
    assert all("seconds" not in rows[name] for name in ("wrong", "absent", "elsewhere"))


def test_without_a_baseline_there_is_no_ratio() -> None:
    rows = rows_of(replace(EAGER, prepare=fails), replace(EAGER, name="other"))
    assert "seconds" in rows["other"] and "ratio_to_torch_eager" not in rows["other"]


def test_an_entrant_may_move_other_bytes_than_the_floor() -> None:
    rows = rows_of(EAGER, replace(EAGER, name="more", bytes_each=lambda work: 9.0))
    assert rows["torch eager"]["bytes_per_parameter"] == 3.0 and rows["more"]["bytes_per_parameter"] == 9.0


def test_a_wrong_round_trip_is_seen() -> None:
    x = torch.randn(64, 256)
    with pytest.raises(CheckFailed, match="median error of the round trip"):
        check_round_trip(1.1 * x, x)
