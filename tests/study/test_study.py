"""The accuracy study: a smoke of the runs, the verdict's teeth, and the recorded results."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.environment import ROOT
from bench.rows import read_jsonl
from bench.study import data, report
from bench.study.optimizers import CONTROL, OPTIMIZERS, REFERENCE, ControlAdamW, Shadow
from bench.study.runs import study
from bench.study.train import Recipe

RECORDED = ROOT / "bench" / "results" / "study_pydoc.jsonl"
SMOKE = Recipe(steps=40, batch_size=4, length=32, width=32, layers=1, warmup=5, evaluations=2, error_every=5, validation=4)


@pytest.fixture(scope="module")
def smoke() -> dict[str, dict]:
    return {row["optimizer"]: row for row in study(SMOKE, seeds=1, betas=(0.999,), workers=2)}


def test_every_optimizer_learns(smoke):
    for name, row in smoke.items():
        assert row["first_training_loss"] == smoke[REFERENCE]["first_training_loss"], "the runs must start alike"
        assert row["final_loss"] < row["first_training_loss"] - 1.0, name
        assert [step for step, _ in row["curve"]] == [20, 40]
        assert row["best_loss"] <= row["final_loss"]


def test_the_update_error_tells_the_optimizers_apart(smoke):
    errors = {name: report.typical_error(row) for name, row in smoke.items()}
    # float32 rounding of parameters of 0.02 to 1 beside updates of 1e-3
    assert errors[REFERENCE] < 1e-3
    for name in OPTIMIZERS:
        if name not in (REFERENCE, CONTROL):
            assert 1e-3 < errors[name] < errors[CONTROL]


def test_the_shadow_is_adamw_and_sees_a_wrong_update():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4096))
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    adamw, shadow = torch.optim.AdamW([p], **settings), Shadow([p], settings["betas"], settings["eps"])
    for _ in range(5):
        p.grad = torch.randn_like(p)
        shadow.observe()
        before = [p.detach().clone()]
        adamw.step()
        assert shadow.update_error(before, 1e-2, 0.1) < 1e-4
    with torch.no_grad():
        p.add_(p - before[0], alpha=0.05)
    assert shadow.update_error(before, 1e-2, 0.1) == pytest.approx(0.05, rel=0.3)


def test_the_control_is_adamw_until_its_moments_are_carried():
    torch.manual_seed(0)
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    start, grads = torch.randn(5000), torch.randn(2, 5000)
    ends = []
    for optimizer in (ControlAdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(start.clone())
        stepper = optimizer([p], **settings)
        for grad in grads:
            p.grad = grad.clone()
            stepper.step()
            ends.append(p.detach().clone())
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-6)
    assert (ends[1] - ends[3]).abs().max() > 1e-4


def test_the_text_is_the_interpreters_and_its_parts_are_apart():
    text = data.text()
    training, validation = data.split(text)
    assert training.numel() + validation.numel() == len(text) > 300_000
    assert bytes(validation[-100:].tolist()) == text[-100:]
    generator = torch.Generator().manual_seed(0)
    inputs, targets = data.batch(training, 3, 16, generator)
    assert inputs.shape == targets.shape == (3, 16) and torch.equal(inputs[:, 1:], targets[:, :-1])


def planted(errors: dict[str, float], losses: dict[str, float]) -> list[dict]:
    """Rows of three seeds, 1 % apart, with the losses shifted and the errors as given."""
    rows = []
    for beta2 in (0.95, 0.999):
        for seed in range(3):
            for name in OPTIMIZERS:
                loss = 2.0 + 0.01 * seed + losses.get(name, 0.0)
                error = errors.get(name, 0.04) * (1 + 0.02 * seed)
                rows.append(
                    {"optimizer": name, "seed": seed, "beta2": beta2, "final_loss": loss, "best_loss": loss, "update_error": [[1, error]]}
                )
    return rows


def test_the_verdict_passes_what_is_right_and_fails_what_is_not():
    apart = {CONTROL: 0.1, REFERENCE: 1e-5}
    assert report.verdict(planted(apart, {})) == []
    assert report.verdict(planted({}, {CONTROL: 0.1})) == [], "told apart by its loss"
    for rows, complaint in (
        (planted(apart, {"FP8AdamW e4m3": 0.015}), "loss differs by +0.75%"),
        (planted(apart, {"FP8AdamW e4m3": 0.025}), "torch's seeds by 0.0200"),
        (planted(apart, {"FP8AdamW e4m3": float("nan")}), "nan"),
        (planted({}, {}), "cannot be told from FP8AdamW e4m3"),
        (planted({**apart, "FP8AdamW e4m3, log8": 0.1}, {}), "cannot be told from FP8AdamW e4m3, log8"),
        (planted(apart, {})[:-1], f"{CONTROL}: not 3 seeds"),
    ):
        failures = report.verdict(rows)
        assert any(complaint in failure for failure in failures), (complaint, failures)


def test_the_recorded_study_passes():
    assert RECORDED.exists(), "no recorded study: run `make study` and commit bench/results/study_pydoc.*"
    rows = read_jsonl(RECORDED)
    assert report.verdict(rows) == []
    environment = rows[0]["environment"]
    assert environment["commit"] != "unknown" and environment["versions"]["torch"] and "sha256" in environment["text"]
    # the verdict must depend on what was recorded: with the control's runs under another name it has to fail
    swapped = copy.deepcopy(rows)
    names = {CONTROL: "FP8AdamW e4m3", "FP8AdamW e4m3": CONTROL}
    for row in swapped:
        row["optimizer"] = names.get(row["optimizer"], row["optimizer"])
    assert report.verdict(swapped) != []
