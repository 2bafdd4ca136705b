"""The activation study: a run of a few steps in every form, its measurements, the verdict's teeth, and the recorded results."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from bench.environment import ROOT
from bench.rows import read_jsonl
from bench.study import flux
from bench.study.activations import forms, report, train, works
from bench.study.activations.__main__ import RESULTS, learning_rates
from bench.study.activations.forms import COAT, CONTROL, FLOAT32, FORMS

RECORDED = RESULTS / "activation_study.jsonl"
SMOKE = {
    "flux": works.FluxLoRA(steps=12, batch_size=2, evaluations=1, validation=1, base_steps=2, base_batch_size=2),
    "digits": works.Digits(steps=12, batch_size=64, width=64, layers=1, evaluations=1, validation=1),
    "language": works.Language(steps=12, batch_size=4, width=64, layers=1, length=32, evaluations=1, validation=2),
}


@pytest.mark.parametrize("work", SMOKE)
def test_every_form_starts_alike_and_learns_from_packed_activations(work, tmp_path, monkeypatch):
    if work == "flux":
        monkeypatch.setattr(flux, "CACHE", tmp_path)
        flux.prepare(SMOKE[work].base_steps, SMOKE[work].base_batch_size)
    rows = {form: train.run(train.case(SMOKE[work], form, 4e-3, 0)) for form in FORMS}
    plain = rows[FLOAT32]
    assert plain["sqnr"] == [] and plain["saved_bytes_in_8_bits"] == 0
    for form, row in rows.items():
        # the forward pass is not quantized: other kernels' float32 rounding at most
        assert row["first_training_loss"] == pytest.approx(plain["first_training_loss"], rel=1e-5), form
        assert row["final_training_loss"] < row["first_training_loss"], form
        if form != FLOAT32:
            assert row["final_loss"] != plain["final_loss"]
            assert row["saved_bytes"] <= report.SAVED_SHARE * plain["saved_bytes"] and row["saved_bytes_in_8_bits"], form
            assert len(row["sqnr"]) == train.COMPARISONS
    # formats: three mantissa bits, two; a scale for each group or one for all; per group the better of e4m3 and int8
    control, e4m3, auto = (report.typical(rows[form], "all") for form in (CONTROL, *COAT))
    assert control + report.CONTROL_GAP < e4m3 < auto


def test_sqnr_of_planted_errors():
    reference = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 12.0]), "none": torch.tensor([1e-9])}
    measured = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0, 12.0]), "none": torch.tensor([-1e-9])}
    found = train.sqnr(reference, measured)
    assert found["all"] == pytest.approx(10 * math.log10(169 / 0.25)), "noise 0.5^2, signal 5^2 + 12^2"
    assert found["worst"] == pytest.approx(20) and found["worst_parameter"] == "a", "5^2 / 0.5^2; rounding of nothing is no parameter"
    assert train.sqnr(reference, reference)["all"] == math.inf
    with pytest.raises(ValueError, match=r"gradients of different parameters: \['b'\]"):
        train.sqnr(reference, {"a": measured["a"], "none": measured["none"]})


def test_the_twin_has_the_networks_weights_and_its_gradients():
    work = SMOKE["digits"]
    torch.manual_seed(0)
    network = work.build()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    batch = work.batch(work.load()[0], torch.Generator().manual_seed(0))
    work.loss(network, batch).backward()
    found = train.sqnr(train.twin_gradients(twin, network, work, batch), train.gradients(network))
    assert found["all"] == math.inf, "the same arithmetic on the same weights"


def test_saved_bytes_are_those_that_stay():
    linear, x = nn.Linear(8, 4), torch.randn(16, 8)
    # relu's output; the product and the sum around it are gone
    assert train.saved_bytes(lambda: (linear(x).relu() * 2).sum()) == {"saved_bytes": 16 * 4 * 4, "saved_bytes_in_8_bits": 0}


def test_the_control_packs_activations_and_leaves_parameters():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    network = copy.deepcopy(plain)
    forms.convert(network, CONTROL)
    x = torch.randn(128, 64)
    for each in (plain, network):
        each(x).square().sum().backward()
    for ours, theirs in zip(network, plain, strict=True):
        assert torch.equal(ours.bias.grad, theirs.bias.grad), "made of weights alone"
        error = (ours.weight.grad - theirs.weight.grad).norm() / theirs.weight.grad.norm()
        # two mantissa bits: an element is off by up to 2^-3 of itself, uniformly between codes; sums of 128 products are as far off as one
        assert 2**-6 < error < 2**-3, error


def planted(losses: dict[tuple[str, str], float] | None = None, control_db: float = 28.0, share: float = 0.5) -> list[dict]:
    """Rows of a study in which every form ends at 2.0, its seeds 1 % apart, but for the final losses added."""
    rows = []
    for name, kind in works.WORKS.items():
        for seed in report.SEEDS:
            for form in FORMS:
                asked = train.case(kind(), form, 1e-2, seed)
                assert asked["work"] == name
                decibels = {FLOAT32: None, CONTROL: control_db}.get(form, 36.0)
                compared = (
                    [] if decibels is None else [{"step": s, "all": decibels + s, "worst": 20.0, "worst_parameter": "p"} for s in range(3)]
                )
                packed = form != FLOAT32
                rows.append(
                    {
                        "case": asked,
                        "final_loss": 2.0 + 0.01 * seed + (losses or {}).get((name, form), 0.0),
                        "sqnr": compared,
                        "saved_bytes": 1000 * (share if packed else 1),
                        "saved_bytes_in_8_bits": 400 if packed else 0,
                    }
                )
    return json.loads(json.dumps(rows))


def changed(rows: list[dict], work: str, form: str, seed: int, **values) -> list[dict]:
    for row in rows:
        if (row["case"]["work"], row["case"]["form"], row["case"]["seed"]) == (work, form, seed):
            row.update(values)
    return rows


def test_the_verdict_passes_what_is_right_and_fails_what_is_not():
    assert report.verdict(planted()) == []
    assert report.verdict(planted({("flux", "e4m3"): 0.0200})) == []
    told_by_loss = {(work, CONTROL): 0.03 for work in works.WORKS}
    assert report.verdict(planted(told_by_loss, control_db=35.0)) == []
    for rows, complaint in (
        (planted({("flux", "e4m3"): 0.021}), "flux: e4m3: loss differs by +1.04%"),
        (planted({("language", "auto"): -0.021}), "language: auto: loss differs by -1.04%"),
        (planted({("digits", "auto"): math.nan}), "digits: auto: loss differs by +nan%"),
        (planted(control_db=33.1), "flux: the control cannot be told apart: loss +0.00%, gradients +2.9, +2.9, +2.9 dB"),
        (changed(planted(), "digits", CONTROL, 1, sqnr=planted()[1]["sqnr"]), "digits: the control cannot be told apart"),
        (changed(planted(), "digits", CONTROL, 1, sqnr=[]), "digits: the control cannot be told apart"),
        (planted(share=0.71), "flux: e4m3: saves 0.71 of float32's bytes"),
        (changed(planted(), "flux", "auto", 2, saved_bytes_in_8_bits=0), "flux: auto: saves 0.50 of float32's bytes, 0 in 8 bits"),
        (planted()[:-1], f"language: {CONTROL}: not on seeds [0, 1, 2]"),
        ([row for row in planted() if row["case"]["form"] != FLOAT32], f"flux: {FLOAT32}, e4m3, auto, {CONTROL}: not on seeds"),
    ):
        failures = report.verdict(rows)
        assert any(complaint in failure for failure in failures), (complaint, failures)


def test_table_and_plot_are_drawn(tmp_path):
    report.plot(planted(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert report.markdown(planted()).count("\n| flux |") == len(FORMS)


def test_learning_rates_are_the_recorded_studies():
    assert learning_rates().keys() == works.WORKS.keys()


def test_the_recorded_study_passes():
    assert RECORDED.exists(), "no recorded study: run `make activation-study` and commit bench/results/activation_study.*"
    rows = read_jsonl(RECORDED)
    assert report.verdict(rows) == []
    lrs = learning_rates()
    for row in rows:
        work = works.WORKS[row["case"]["work"]]()
        assert row["case"] == train.case(work, row["case"]["form"], lrs[work.name], row["case"]["seed"])
        assert row["environment"]["commit"] != "unknown" and row["environment"]["versions"]["diffusers"]
    assert (ROOT / "bench" / "results" / "activation_study.md").read_text() == report.markdown(rows)
    # the verdict must depend on what was recorded
    for form in COAT:
        for work in works.WORKS:
            loss = next(row["final_loss"] for row in rows if (row["case"]["work"], row["case"]["form"]) == (work, form))
            assert report.verdict(changed(copy.deepcopy(rows), work, form, 0, final_loss=loss * 1.1)), (work, form)
    for work in works.WORKS:
        ours = report.found(rows, work, "e4m3")[0]["sqnr"]
        failures = report.verdict(changed(copy.deepcopy(rows), work, CONTROL, 0, sqnr=ours))
        assert [failure.partition(":")[0] for failure in failures] == [work], "a control with e4m3's gradients"
