"""`python -m bench.gpu_check`: everything that needs an NVIDIA GPU, in one command of at most ten minutes.

Builds the extension in place, runs the tests marked `gpu`, the whole suite, compute-sanitizer on `bench.sanitize`, and the
bench, whose rows land under `bench/results/`. Correctness first: the bench keeps its share of the time whatever the tests take.
Exit code 0 if every stage passed, 1 if one failed, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .environment import ROOT, describe


@dataclass(frozen=True)
class Stage:
    """A command and the seconds it may take.

    Args:
        missing: why it cannot run here; it is then reported, not failed.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    missing: str | None = None


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    seconds: float
    tail: str


def _absent(*modules: str) -> str | None:
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(lacking)} not installed" if lacking else None


def stages(commit: str | None, peers: bool) -> list[Stage]:
    """The plan. The limits leave the bench 300 of 600 seconds: Inductor compiles for each shape."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "--maxfail=20", "--no-header", "-p", "no:cacheprovider")
    parallel = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    sanitizer = shutil.which("compute-sanitizer")
    compiler = None if shutil.which(os.environ.get("CXX", "g++")) else "no C++ compiler"
    bench = (python, "-m", "bench", "--device", "cuda", *(("--commit", commit) if commit else ()))
    return [
        Stage("build", (python, "setup.py", "build_ext", "--inplace"), 90, compiler or _absent("cmake", "ninja", "pybind11")),
        Stage("gpu tests", (*pytest, "-m", "gpu", "tests"), 150, _absent("pytest")),
        Stage(
            "memory check",
            (sanitizer or "", "--tool", "memcheck", "--error-exitcode", "9", python, "-m", "bench.sanitize"),
            120,
            None if sanitizer else "compute-sanitizer is not installed",
        ),
        Stage("whole suite", (*pytest, "-m", "not gpu", *parallel, "tests"), 180, _absent("pytest")),
        Stage("bench", (*bench, *(() if peers else ("--filter", "coat|torch "))), 300),
    ]


def run(stage: Stage, remaining_s: float) -> Outcome:
    """Runs a stage, its output passed through; a stage that outlasts its limit is ended and counts as failed."""
    if stage.missing:
        return Outcome(stage.name, f"not run: {stage.missing}", 0.0, "")
    limit = min(stage.limit_s, remaining_s)
    if limit < 5:
        return Outcome(stage.name, "failed: no time left", 0.0, "")
    print(f"== {stage.name} (at most {limit:.0f} s): {' '.join(stage.command)}", flush=True)
    began = time.perf_counter()
    # its own session, so that the end of its time also ends the processes it started
    process = subprocess.Popen(
        stage.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
        result = "passed" if process.returncode == 0 else f"failed: exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        result = f"failed: stopped after {limit:.0f} s"
    tail = "\n".join(output.strip().splitlines()[-40:])
    print(tail, flush=True)
    return Outcome(stage.name, result, time.perf_counter() - began, tail)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together (default: %(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="measure this package and torch only")
    parser.add_argument("--commit", help="commit to name in the rows where the checkout has no git history")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages only")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            f"gpu-check needs an NVIDIA GPU and a CUDA build of torch; torch {torch.__version__} sees no device. "
            "What needs none is in `make test` (the kernels' compilation for every architecture included).",
            file=sys.stderr,
        )
        return 2
    planned = stages(arguments.commit, not arguments.no_peers)
    if arguments.only:
        names = [stage.name for stage in planned]
        if unknown := set(arguments.only) - set(names):
            parser.error(f"unknown stage {', '.join(sorted(unknown))}; stages: {', '.join(names)}")
        planned = [stage for stage in planned if stage.name in arguments.only]
    end = time.perf_counter() + 60 * arguments.minutes
    outcomes = []
    for stage in planned:
        # what comes before the bench may not eat its time
        reserved = planned[-1].limit_s if stage is not planned[-1] and planned[-1].name == "bench" else 0.0
        outcomes.append(run(stage, end - time.perf_counter() - reserved))
    record = {"environment": describe("cuda", arguments.commit), "stages": [asdict(outcome) for outcome in outcomes]}
    path = Path(ROOT, "bench", "results", "gpu_check.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    for outcome in outcomes:
        print(f"{outcome.name:14s} {outcome.seconds:6.1f} s  {outcome.result}")
    return 1 if any(outcome.result.startswith("failed") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
