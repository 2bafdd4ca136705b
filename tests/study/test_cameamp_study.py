"""CameAMP against tuned AdamW: a run of a few steps, the verdict's teeth, and the recorded results."""

from __future__ import annotations

import copy
import math

import pytest

from bench.environment import ROOT
from bench.rows import read_jsonl
from bench.study import flux
from bench.study.cameamp import report, train
from bench.study.cameamp.entrants import FLOAT32, LRS, PROFILES, REFERENCE

RECORDED = ROOT / "bench" / "results" / "cameamp_study.jsonl"


@pytest.fixture
def base(tmp_path, monkeypatch) -> train.Recipe:
    monkeypatch.setattr(flux, "CACHE", tmp_path)
    recipe = train.Recipe(base_steps=2, base_batch_size=2, steps=8, batch_size=2)
    sizes = recipe.base_steps, recipe.base_batch_size
    path = flux.prepare(*sizes)
    before = path.stat().st_mtime_ns
    assert flux.prepare(*sizes) == path and path.stat().st_mtime_ns == before, "the base model is trained once"
    return recipe


def test_every_entrant_trains_the_same_adapter_on_the_same_batches(base):
    rows = {name: train.run(train.case(base, name, 1e-2, 0)) for name in (REFERENCE, "balanced", FLOAT32)}
    assert len({row["losses"][0] for row in rows.values()}) == 1, "the runs must start alike"
    assert len({row["base_loss"] for row in rows.values()}) == 1
    for name, row in rows.items():
        assert len(row["losses"]) == 8 and row["final_loss"] < row["base_loss"], name
    assert rows["balanced"]["state_bytes_per_parameter"] < report.STATE_BYTES < rows[FLOAT32]["state_bytes_per_parameter"]
    assert rows["balanced"]["state_bytes_per_parameter"] < rows["balanced"]["state_bytes_per_parameter_early"]


def planted(losses: dict[str, float] | None = None, best: int = 1, state_bytes: float = 3.0) -> list[dict]:
    """Rows of a study in which every entrant ends at 0.1, but for the losses given; the `best`-th learning rate is the best."""
    rows = []
    for name in report.ENTRANTS:
        lrs = LRS.get(name, LRS["balanced"])
        for lr in lrs:
            for seed in (report.SWEEP_SEED, *report.SEEDS):
                if (name == FLOAT32 and seed == report.SWEEP_SEED) or (lr != lrs[best] and seed != report.SWEEP_SEED):
                    continue
                row = train.case(train.Recipe(), name, lr, seed)
                loss = (losses or {}).get(name, 0.1) + (0.0 if lr == lrs[best] else 0.01)
                each = 8.0 if name == REFERENCE else state_bytes
                bytes_ = {"state_bytes_per_parameter": each, "state_bytes_per_parameter_early": each}
                rows.append({"case": row, "final_loss": loss, "base_loss": 0.3, "losses": [0.3, loss], **bytes_})
    return rows


def test_the_verdict_passes_what_is_right_and_fails_what_is_not():
    assert report.verdict(planted()) == []
    assert report.verdict(planted({"balanced": 0.1029})) == []
    assert report.verdict(planted({"balanced": 0.05})) == [], "better than AdamW is no failure"
    for rows, complaint in (
        (planted({"balanced": 0.1031}), "balanced: loss lies +3.10%"),
        (planted({"memory_optimized": math.nan}), "memory_optimized: "),
        (planted(best=0), "is not tuned"),
        (planted(best=-1), "is not tuned"),
        (planted({name: 0.9 for name in report.ENTRANTS}), "says nothing"),
        (planted(state_bytes=9.0), "quality_optimized: 9.00 state bytes"),
        ([row for row in planted() if row["case"]["seed"] != 2], "balanced: not on seeds [0, 1, 2]"),
        ([row for row in planted() if row["case"]["optimizer"] != "balanced"], "balanced: not on seeds"),
    ):
        failures = report.verdict(rows)
        assert any(complaint in failure for failure in failures), (complaint, failures)


def test_table_and_plot_are_drawn(tmp_path):
    report.plot(planted(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert all(f"| {name} |" in report.markdown(planted()) for name in report.ENTRANTS)


def test_the_recorded_study_passes():
    assert RECORDED.exists(), "no recorded study: run `make cameamp-study` and commit bench/results/cameamp_study.*"
    rows = read_jsonl(RECORDED)
    assert report.verdict(rows) == []
    assert all(row["environment"]["commit"] != "unknown" and row["environment"]["versions"]["diffusers"] for row in rows)
    # the verdict must depend on what was recorded
    worse = copy.deepcopy(rows)
    for row in worse:
        if row["case"]["optimizer"] in PROFILES:
            row["final_loss"] *= 1.5
    assert len(report.verdict(worse)) == len(PROFILES)
