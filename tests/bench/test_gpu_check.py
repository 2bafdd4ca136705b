"""`make gpu-check` without a GPU: says so; its stages end in time and report what happened."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bench.environment import ROOT
from bench.gpu_check import Stage, main, run, stages


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is at hand")
def test_without_a_device_it_says_so_and_exits_2():
    done = subprocess.run([sys.executable, "-m", "bench.gpu_check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr and "make test" in done.stderr


def test_a_stage_reports_its_end():
    python = sys.executable
    assert run(Stage("good", (python, "-c", "print('fine')"), 60), 60).result == "passed"
    bad = run(Stage("bad", (python, "-c", "print('why'); raise SystemExit(3)"), 60), 60)
    assert bad.result == "failed: exit code 3" and "why" in bad.tail
    slow = run(Stage("slow", (python, "-c", "import time; time.sleep(60)"), 5), 60)
    assert slow.result == "failed: stopped after 5 s" and slow.seconds < 30
    assert run(Stage("absent", ("nothing",), 60, missing="nothing is not installed"), 60).result == "not run: nothing is not installed"
    assert run(Stage("late", (python, "-c", ""), 60), 2).result == "failed: no time left"


def test_the_plan_fits_ten_minutes_with_the_bench_last(monkeypatch):
    plan = stages("abc", peers=True)
    assert [stage.name for stage in plan] == ["build", "gpu tests", "memory check", "whole suite", "bench"]
    # whatever comes first is cut short so that the bench keeps its time (`main`); each must still fit beside it
    assert all(stage.limit_s + plan[-1].limit_s <= 9.5 * 60 for stage in plan[:-1])
    assert plan[-1].command[-2:] == ("--commit", "abc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        main(["--only", "no such stage"])
