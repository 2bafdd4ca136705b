"""The codec table: metrics on planted cases, replays against the optimizer's own step, the page against the committed rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from bench.codecs import measure, report
from bench.codecs.measure import Replay, cell, pair_rows, range_rows, width_rows
from bench.codecs.recordings import ALIGNMENT, Piece, Recording, recording, synthetic
from bench.codecs.replay import BETA1, BETA2, EPS, METRICS, SLOW_BETA2, Schedule
from bench.codecs.stores import FIRST, GROUP_SIZES, SECOND, Store
from bench.environment import ROOT
from bench.rows import read_jsonl
from coat_kernels.formats import reference
from coat_kernels.formats.codecs import CODECS
from coat_kernels.formats.reference import decode_group
from coat_kernels.ops.adamw_fp8 import Hyperparameters, StateFormat
from coat_kernels.ops.adamw_fp8.reference import adamw_fp8

ROWS = ROOT / "bench" / "results" / "codecs.jsonl"
PAGE = ROOT / "docs" / "codecs.md"
STEPS, ELEMENTS = 30, 1024


def silent(line: str) -> None:
    pass


@dataclass(frozen=True)
class Planted(Store):
    """A store with a known fault: it multiplies, and drops every `drops`-th element."""

    factor: float = 1.0
    drops: int = 0

    def carried(self, x, group_size, step):
        x = x * self.factor
        if self.drops:
            x[:: self.drops] = 0
        return x


def planted(signed: bool, **fault) -> Planted:
    return Planted("float32", signed, **fault)


@pytest.fixture(scope="module")
def replay() -> Replay:
    return Replay(synthetic(STEPS, ELEMENTS))


def metrics(replay: Replay, first: Store, second: Store, beta2: float = SLOW_BETA2) -> dict[str, float]:
    found = replay.cells(replay.track(first, 128), replay.track(second, 128))
    return dict(zip(METRICS, found[cell("synthetic", beta2)], strict=True))


def test_an_exact_pair_is_exactly_right(replay):
    for beta2 in BETA2:
        assert metrics(replay, FIRST[0], SECOND[0], beta2) == {"one_shot": 0, "running": 0, "early": 0, "largest": 1, "flushed": 0}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"factor": 1.1}, {}, 0.1),
        ({"factor": 0.0}, {}, 1.0),
        # eps is far below sqrt(v): a quarter of v doubles the update
        ({}, {"factor": 0.25}, 1.0),
        ({}, {"factor": 4.0}, 0.5),
        ({"drops": 4}, {}, None),
    ],
)
def test_the_one_shot_error_is_the_planted_one(replay, first, second, expected):
    found = metrics(replay, planted(True, **first), planted(False, **second))
    if expected is None:
        step = replay.schedule.late[-1]
        exact = replay.exact_first.running[step] / replay.exact_second.running[step].chunk(2)[1].sqrt()
        # elements are alike on average: a quarter of the squared norm goes
        assert found["one_shot"] == pytest.approx((exact[::4].norm() / exact.norm()).item(), rel=0.15)
    else:
        assert found["one_shot"] == pytest.approx(expected, rel=2e-3)


def test_a_moment_that_is_not_carried_leaves_the_last_gradient(replay):
    found = metrics(replay, planted(True, factor=0.0), planted(False))
    errors = []
    for step in replay.schedule.late:
        exact = replay.exact_first.running[step] / (replay.exact_second.running[step].chunk(2)[1] / (1 - SLOW_BETA2**step)).sqrt()
        last = (1 - BETA1) * replay.recording.grads[step - 1] * exact / replay.exact_first.running[step]
        errors.append(((last - exact).norm() / exact.norm()).item())
    assert found["running"] == pytest.approx(sum(errors) / len(errors), rel=2e-3)


def test_a_codec_that_flushes_v_shows_it(replay):
    dropped = metrics(replay, planted(True), planted(False, drops=4))
    assert dropped["flushed"] == pytest.approx(0.25)
    # m / eps where v is gone: beta1 of m and none of v survives
    assert dropped["one_shot"] > 1e3
    kept, flushed = (metrics(replay, FIRST[0], Store("e4m3", False, flushes=flushes)) for flushes in (False, True))
    assert kept["flushed"] == 0 and kept["largest"] < 3
    assert flushed["flushed"] > 0.005 and flushed["one_shot"] > 10 * kept["one_shot"]
    for store in SECOND:
        if not store.flushes:
            assert metrics(replay, FIRST[0], store)["flushed"] == 0, store.name


def test_drift_and_error_of_the_second_moment_alone(replay):
    row = replay.rounding_row(planted(False), replay.track(planted(False, factor=1.01), 128), 128)
    assert row["steps"] == [3, 7, 15, 30]
    # a constant part of 1 % a step in a moving average of t steps that has not settled
    track, exact = replay.track(planted(False, factor=1.01), 128), replay.exact_second
    last = (track.running[30] / exact.running[30]).chunk(2)[1]
    assert row["drift"][-1] == pytest.approx(last.median().item() - 1, rel=1e-2) and 0.05 < row["drift"][-1] < 0.3
    assert 0 < row["error"][0] < row["error"][-1] < row["drift"][-1]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_replay_carries_what_the_optimizer_carries(rounding):
    """Codes of the reference step on the same gradients decode to what the replay stored, step by step."""
    source = synthetic(6, ELEMENTS)
    replay = Replay(source)
    first, second = Store("e4m3_expand", True), Store("log8", False, rounding)
    tracks = replay.track(first, 128), replay.track(second, 128)
    fmt = StateFormat(CODECS[first.codec], CODECS[second.codec], 128, "nearest", rounding)
    hyper = Hyperparameters(lr=1e-3, beta1=BETA1, beta2=BETA2[0], eps=EPS, weight_decay=0.0)
    groups = ELEMENTS // 128
    state = [torch.zeros(ELEMENTS), torch.zeros(ELEMENTS, dtype=torch.uint8), torch.zeros(ELEMENTS, dtype=torch.uint8)]
    state += [torch.zeros(groups, 2), torch.full((groups, 2), 16, dtype=torch.uint8)]
    for step, grad in enumerate(source.grads, 1):
        param, *held = state
        # the generator numbers a tensor's elements: those of the first beta2 come first in a replay
        *state, _ = adamw_fp8(param, grad, *held, None, step=step, index=0, fmt=fmt, hyper=hyper)
        if step in replay.schedule.steps:
            _, m, v, amax, k16 = state
            for column, (codes, codec, track) in enumerate(((m, fmt.exp_avg, tracks[0]), (v, fmt.exp_avg_sq, tracks[1]))):
                decoded = decode_group(codes, amax[:, column].contiguous(), k16[:, column].contiguous(), codec, 128)
                torch.testing.assert_close(decoded, track.stored[step][:ELEMENTS], rtol=1e-6, atol=0)


def test_a_recording_holds_what_the_optimizer_saw():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Linear(40, 1), torch.nn.Linear(1, 1))
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with recording(names, (Piece("0.weight", 256, 512), Piece("1.bias"), Piece("2.weight"))) as grads:
        for _ in range(2):
            model[:2](torch.randn(3, 20)).sum().backward()
            seen.append((model[0].weight.grad.clone(), model[1].bias.grad.clone()))
            optimizer.step()
            optimizer.zero_grad()
    model[:2](torch.randn(3, 20)).sum().backward()
    optimizer.step()
    assert len(grads) == 2, "the hook must go with the block"
    for kept, (weight, bias) in zip(grads, seen, strict=True):
        assert kept.shape == (4 * ALIGNMENT,)
        torch.testing.assert_close(kept[:512], weight.flatten()[256:768], rtol=0, atol=0)
        assert kept[512] == bias and not kept[513:].any(), "padding and a missing gradient are zeros"


def test_synthetic_gradients_repeat():
    assert torch.equal(synthetic(4, 512).grads, synthetic(4, 512).grads)


def test_schedules_stay_inside_the_recording():
    for steps in (6, 30, 400, 1500):
        schedule = Schedule.over(steps)
        assert max(schedule.early) <= max(2, steps // 10) and schedule.late[-1] == steps == schedule.marks[-1]
        assert min(schedule.late) > steps - steps / 3 - 1


def small_rows() -> list[dict]:
    recordings = [Recording(name, "planted", synthetic(STEPS, ELEMENTS).grads) for name in report.RECORDINGS]
    firsts = [store for store in FIRST if store.codec in ("float32", "e4m3_expand", "softsign8", "dynamic8")]
    seconds = [store for store in SECOND if store.codec in ("float32", "e4m3_expand", "e4m3", "log8", "dynamic8")]
    rows = [
        {
            "kind": "environment",
            "date": "2026-01-02T03",
            "commit": "abc",
            "cpu": "a cpu",
            "threads": 1,
            "cpu_isa": None,
            "versions": {"torch": "2"},
        }
    ]
    rows += [r.row() for r in recordings]
    rows += pair_rows(recordings, silent, firsts=firsts, seconds=seconds, group_sizes=(32, 128, 256))
    return rows + width_rows(recordings, group_sizes=(128,)) + range_rows(recordings, silent, caps=(20, 32))


def test_the_page_is_made_of_the_rows(tmp_path):
    rows = small_rows()
    found = report.pairs(rows)
    assert found["float32", "float32", None]["bytes"] == 8
    assert found[report.COAT]["bytes"] == pytest.approx(2 + 10 / 128)
    assert found["dynamic8", "dynamic8", 256]["bytes"] == pytest.approx(2 + 8 / 256)
    assert ("float32", "e4m3, flushes", 256) not in found, "controls are measured in one group size"
    page = report.markdown(rows)
    shown = f"{report.metric(found[report.RECOMMENDED], 'running', ['lora'])[0]:.2g}"
    assert shown in page
    found[report.RECOMMENDED]["cells"][cell("lora", BETA2[0])][METRICS.index("running")] = 0.123456
    assert "0.12" in report.markdown(rows) and report.markdown(rows) != page
    report.plot(rows, tmp_path / "codecs.png")
    assert (tmp_path / "codecs.png").stat().st_size > 10_000


def test_best_for_bytes_is_the_front_and_no_control_wins():
    def row(m: str, bytes_each: float, error: float, control: bool = False) -> dict:
        cells = {cell(r, b): [error] * len(METRICS) for r in report.REAL for b in BETA2}
        return {"kind": "pair", "m": m, "v": "x", "group_size": 128, "bytes": bytes_each, "control": control, "cells": cells}

    rows = [row("c", 2.1, 0.04), row("a", 1.0, 0.3), row("worse", 2.1, 0.05), row("late", 3.0, 0.05), row("b", 2.0, 0.1)]
    rows += [row("control", 1.0, 0.001, control=True), row("exact", 8.0, 0.0)]
    rows.append(row("dynamic8", 1.0, 0.001))
    assert [r["m"] for r in report.best_for_bytes(rows)] == ["a", "b", "c", "exact"], "dynamic8 has no step with another codec"


def test_the_range_cap_is_changed_for_the_measurement_alone():
    def one_shot(octaves: float) -> list[float]:
        """By cap, where every group of gradients spans half as many octaves as its v."""
        group = torch.logspace(0, -octaves / 2, 256, base=2).repeat(ELEMENTS // 256)
        rows = range_rows([Recording("wide", "", group.repeat(STEPS, 1))], silent, caps=(20, 32), group_sizes=(256,))
        assert [row["used"] for row in rows] == [False, True]
        return [row["cells"][cell("wide", SLOW_BETA2)][METRICS.index("one_shot")] for row in rows]

    narrow, used = one_shot(18)
    assert narrow == used, "nothing is cut at either width"
    narrow, used = one_shot(30)
    assert narrow > 1.5 * used, "what lies under 20 octaves is raised to the lowest code"
    assert reference.MAX_OCTAVES == measure.MAX_OCTAVES == 32


def test_times_are_taken_of_checked_steps_alone(monkeypatch):
    speed = pytest.importorskip("bench.codecs.speed")
    if speed.native is None:
        pytest.skip("without the C++ extension there are no times")
    pairs = [(Store("e4m3_expand", True), Store("log8", False), 128), (Store("dynamic8", True), Store("e4m3", False), 128)]
    ratios, _ = speed.speed_ratios(pairs, numel=4096, rounds=3)
    assert list(ratios) == pairs[:1] and ratios[pairs[0]] > 0, "a pair without a fused step has no time"
    monkeypatch.setattr(speed, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="no time is taken"):
        speed.speed_ratios(pairs, numel=4096, rounds=1)


def test_the_committed_page_is_the_committed_rows():
    rows = read_jsonl(ROWS)
    assert PAGE.read_text() == report.markdown(rows), "run `python -m bench.codecs --only page`"
    found = report.pairs(rows)
    sizes = [(m, v, size) for m in FIRST for v in SECOND for size in GROUP_SIZES if m.offered(size) and v.offered(size)]
    expected = {(m.name, v.name, size if m.grouped or v.grouped else None) for m, v, size in sizes}
    assert set(found) == expected
    for row in found.values():
        assert len(row["cells"]) == len(report.RECORDINGS) * len(BETA2) and all(
            math.isfinite(value) for values in row["cells"].values() for value in values
        )
        assert row["control"] or max(report.metric(row, "flushed")) == 0, "no codec of the package flushes a second moment"


def test_the_recommended_pair_is_the_best_of_its_size():
    rows = read_jsonl(ROWS)
    chosen = report.pairs(rows)[report.RECOMMENDED]
    rivals = [row for row in report.pairs(rows).values() if report.has_step(row) and row["bytes"] <= chosen["bytes"]]
    assert min(rivals, key=report.score) is chosen
