"""The family study: its parts at a few steps, what the ledger skips, the verdict's teeth, and the recorded results."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from bench.environment import ROOT
from bench.rows import read_jsonl, write_jsonl
from bench.study import ledger
from bench.study.family import digits, report, train, works
from bench.study.family.__main__ import final_cases, sweep_cases
from bench.study.family.entrants import FAMILIES, FLOAT32

RECORDED = ROOT / "bench" / "results" / "family_study.jsonl"
SMOKE = {
    "digits": works.Digits(steps=12, batch_size=32, width=32, layers=1, validation=1),
    "language": works.Language(steps=12, batch_size=4, width=32, layers=1, length=32, validation=2),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("work", SMOKE)
def test_every_form_starts_alike_and_learns_in_its_own_bytes(work, name):
    family = FAMILIES[name]
    forms = (FLOAT32, *family.forms)
    # FP8AdamW has three 8-bit forms: one is enough here
    rows = {form: train.run(train.case(SMOKE[work], name, form, family.lrs[1], 0)) for form in forms[:2]}
    plain, quantized = rows.values()
    assert plain["first_training_loss"] == quantized["first_training_loss"], "the runs must start alike"
    assert quantized["final_loss"] != plain["final_loss"], "the 8-bit form steps in float32"
    for row in rows.values():
        assert row["final_training_loss"] < row["first_training_loss"], (name, work)
        assert [step for step, _ in row["curve"]] == [3, 6, 9, 12]
    assert quantized["state_bytes_per_parameter"] < report.STATE_SHARE * plain["state_bytes_per_parameter"]


def test_the_schedule_warms_up_and_comes_down():
    values = [train.schedule(step, 100, 10) for step in range(100)]
    assert values[0] == 0.1 and values[9] == values[10] == 1.0 == max(values)
    assert values[10:] == sorted(values[10:], reverse=True) and 0.02 <= values[-1] < 0.03


def test_the_digits_velocity_is_the_derivative_of_the_path():
    (images, labels), (held_out, _) = digits.load()
    assert len(images) == 1500 and len(held_out) == digits.VALIDATION and labels.max() == 9 and images.abs().max() <= 1
    images, labels, noise, t = digits.noised(images[:8], labels[:8], torch.Generator().manual_seed(0))

    class Exact(torch.nn.Module):
        def forward(self, x, t, labels):
            return (x - images) / t[:, None]

    # (x_t - x) / t = noise - x; the division magnifies float32 rounding at small t
    assert digits.loss(Exact(), images, labels, noise, t) < 1e-9


def fake_run(asked: dict) -> dict:
    return {"final_loss": float(asked["value"])}


def test_the_ledger_runs_what_is_missing_and_survives_a_stop(tmp_path):
    path = tmp_path / "rows.jsonl"
    cases = [{"value": i, "recipe": {"steps": 1}} for i in range(3)]
    kept = {"case": cases[1], "final_loss": 17.0, "environment": {"commit": "old"}}
    stale = {"case": {"value": 1, "recipe": {"steps": 2}}, "final_loss": 18.0, "environment": {}}
    write_jsonl([kept, stale], path)
    rows = ledger.fill(path, cases, fake_run, {"commit": "new"}, workers=1)
    assert [row["final_loss"] for row in rows] == [0.0, 17.0, 2.0], "a recorded case is not run again; another recipe is another case"
    assert [row["environment"]["commit"] for row in rows] == ["new", "old", "new"]
    assert len(read_jsonl(path)) == 4, "rows are appended"
    assert ledger.keep(path, cases) == rows == read_jsonl(path)


def planted(losses: dict[tuple[str, str, str], float] | None = None, state_bytes: float = 2.0) -> list[dict]:
    """Rows of a study in which every form ends at 2.0 and its seeds 1 % apart, but for the final losses given."""
    rows = []
    all_works = [work() for work in works.WORKS.values()]

    def add(asked: dict) -> None:
        where = (asked["work"], asked["optimizer"], asked["form"])
        # the second learning rate is the best
        tuned = FAMILIES[asked["optimizer"]].lrs[1] == asked["lr"]
        loss = 2.0 + 0.01 * (asked["seed"] % 10) + (0.0 if tuned else 0.5) + (losses or {}).get(where, 0.0)
        each = 8.0 if asked["form"] == FLOAT32 else state_bytes
        rows.append({"case": asked, "final_loss": loss, "state_bytes_per_parameter": each})

    for asked in sweep_cases(all_works, list(FAMILIES)):
        add(asked)
    for asked in final_cases(all_works, list(FAMILIES), rows):
        add(asked)
    return json.loads(json.dumps(rows))


def test_the_verdict_passes_what_is_right_and_fails_what_is_not():
    assert report.verdict(planted()) == []
    assert report.verdict(planted({("digits", "Lion8bit", "8-bit"): 0.019})) == []
    lion = ("digits", "Lion8bit", "8-bit")
    for rows, complaint in (
        (planted({lion: 0.021}), "digits: Lion8bit 8-bit: loss differs by +1.04%"),
        (planted({lion: -0.021}), "digits: Lion8bit 8-bit: loss differs by -1.04%"),
        (planted({lion: math.nan}), "digits: Lion8bit 8-bit: loss differs by +nan%"),
        (planted({("language", "FP8AdamW", "softsign8+log8"): 0.03}), "language: FP8AdamW softsign8+log8: loss differs"),
        (planted(state_bytes=5.0), "not in 8 bits"),
        (planted()[:-1], "language: AutomagicCameAMP 8-bit: seeds [0, 1]"),
        ([row for row in planted() if row["case"]["optimizer"] != "Muon8bit"], "digits: Muon8bit: seeds []"),
    ):
        failures = report.verdict(rows)
        assert any(complaint in failure for failure in failures), (complaint, failures)


def test_the_learning_rate_is_tuned_on_a_seed_that_is_not_judged():
    assert report.SWEEP_SEED not in report.SEEDS
    rows = planted({("digits", "Lion8bit", FLOAT32): 0.0})
    assert report.tuned_lr(rows, "digits", "Lion8bit") == FAMILIES["Lion8bit"].lrs[1]
    for row in rows:
        if row["case"]["lr"] == FAMILIES["Lion8bit"].lrs[1] and row["case"]["seed"] == report.SWEEP_SEED:
            row["final_loss"] = math.nan
    assert report.tuned_lr(rows, "digits", "Lion8bit") != FAMILIES["Lion8bit"].lrs[1], "a run that failed is not the best"


def test_tables_and_plot_are_drawn(tmp_path):
    report.plot(planted(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert report.markdown(planted()).count("\n| digits") == sum(len(f.forms) for f in FAMILIES.values()) + len(FAMILIES)


def test_the_recorded_study_passes():
    assert RECORDED.exists(), "no recorded study: run `make family-study` and commit bench/results/family_study.*"
    rows = read_jsonl(RECORDED)
    assert report.verdict(rows) == []
    assert all(row["environment"]["commit"] != "unknown" and row["environment"]["versions"]["torch"] for row in rows)
    # the verdict must depend on what was recorded
    worse = copy.deepcopy(rows)
    for row in worse:
        if row["case"]["form"] != FLOAT32:
            row["final_loss"] *= 1.05
    assert len(report.verdict(worse)) >= sum(len(f.forms) for f in FAMILIES.values())
