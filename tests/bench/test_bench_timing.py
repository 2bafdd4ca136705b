"""The contest: every entrant in every round, slow ones less often, ratios within rounds."""

from __future__ import annotations

import sys
import time

import pytest

from bench.timing import OtherLoad, Run, Times, contest


def clock(run):
    return run()


def constant(seconds, log=None, name=None):
    def run():
        if log is not None:
            log.append(name)
        return seconds

    return Run(run)


def test_a_slow_entrant_sits_rounds_out_evenly():
    times = contest({"fast": constant(0.001), "slow": constant(1.0), "glacial": constant(60.0)}, clock, rounds=12, budget_s=4.0)
    assert sorted(times["fast"].by_round) == list(range(12))
    assert sorted(times["slow"].by_round) == [0, 3, 6, 9]
    assert sorted(times["glacial"].by_round) == [0]


def test_the_order_turns_from_round_to_round():
    log: list[str] = []
    contest({name: constant(0.001, log, name) for name in "abc"}, clock, rounds=3, budget_s=1.0)
    assert log == list("abc") + list("abc") + list("bca") + list("cab")


def test_ratio_pairs_the_rounds():
    # the machine halves its speed in the second half: medians would be of different rounds, pairs are not
    base = Times({i: 1.0 if i < 4 else 2.0 for i in range(8)})
    mine = Times({i: 3.0 * base.by_round[i] for i in (0, 5, 6, 7)})
    assert mine.ratio_to(base) == pytest.approx(3.0)
    assert mine.median == 6.0 and mine.quartiles == [5.25, 6.0]


def test_other_load_is_what_this_process_did_not_use(monkeypatch):
    readings = iter([(100.0, 10.0, 50.0), (103.0, 11.0, 52.0), (0.0, 0.0, 0.0), (1.0, 1.01, 1.0), None, None])
    monkeypatch.setattr(OtherLoad, "_read", staticmethod(lambda: next(readings)))
    found = []
    for _ in range(3):
        with OtherLoad() as load:
            pass
        found.append(load.cores)
    # 3 busy seconds in 2, one of them its own; then a clock tick too few; then no /proc
    assert found == [1.0, 0.0, None]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")
def test_busy_seconds_are_seconds():
    before = OtherLoad._read()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = OtherLoad._read()
    assert before is not None and after is not None
    # the kernel counts in ticks of 10 ms
    assert after[1] - before[1] >= 0.3 and after[0] - before[0] >= 0.25


def test_what_is_done_before_is_not_timed():
    done = []
    times = contest({"x": Run(lambda: 5.0 if done else -1.0, before=lambda: done.append(1))}, clock, rounds=2, budget_s=100.0)
    assert times["x"].median == 5.0 and len(done) == 3
