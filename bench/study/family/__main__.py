"""`python -m bench.study.family`: tune and train every optimizer in both forms; write rows, table and plot.

Rows are appended as runs finish and are not run twice. Exit code 1 if the verdict fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from ...environment import ROOT, describe
from .. import ledger
from ..data import digest, text
from . import report
from .entrants import FAMILIES, FLOAT32
from .train import case, run
from .works import WORKS, Work


def sweep_cases(works: list[Work], families: list[str]) -> list[dict]:
    return [case(work, name, FLOAT32, lr, report.SWEEP_SEED) for work in works for name in families for lr in FAMILIES[name].lrs]


def final_cases(works: list[Work], families: list[str], rows: list[dict]) -> list[dict]:
    """Both forms on all seeds, at the learning rate that the sweep's rows name."""
    cases = []
    for work in works:
        for name in families:
            lr = report.tuned_lr(rows, work.name, name)
            cases += [case(work, name, form, lr, seed) for seed in report.SEEDS for form in (FLOAT32, *FAMILIES[name].forms)]
    return cases


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study.family", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps a run (default: each work's own)")
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="optimizers to run now")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "family_study.jsonl")
    parser.add_argument("--commit", help="commit to name in the rows where the checkout has no git history")
    arguments = parser.parse_args(argv)
    works = [replace(work(), steps=arguments.steps) if arguments.steps else work() for work in WORKS.values()]
    environment = {**describe("cpu", arguments.commit), "threads": 1, "text": digest(text())}

    def fill(cases: list[dict]) -> list[dict]:
        return ledger.fill(arguments.out, cases, run, environment, arguments.workers)

    tried = fill(sweep_cases(works, arguments.only))
    fill(final_cases(works, arguments.only, tried))
    sweep = sweep_cases(works, list(FAMILIES))
    have = [row for key, row in ledger.recorded(arguments.out).items() if key in {ledger.key(asked) for asked in sweep}]
    swept = [name for name in FAMILIES if all(report.sweep(have, work.name, name) for work in works)]
    rows = ledger.keep(arguments.out, [*sweep, *final_cases(works, swept, have)])
    return ledger.publish(rows, arguments.out, report)


if __name__ == "__main__":
    sys.exit(main())
