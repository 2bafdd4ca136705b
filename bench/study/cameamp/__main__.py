"""`python -m bench.study.cameamp`: tune and train AdamW and CameAMP's profiles on a LoRA; write rows, table and plot.

Rows are appended as runs finish and are not run twice. Exit code 1 if the verdict fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ...environment import ROOT, describe, version
from .. import flux, ledger
from . import report
from .entrants import LRS
from .train import Recipe, case, run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study.cameamp", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps of a LoRA (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=Recipe.base_steps, help="of the base model (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=report.ENTRANTS, default=report.ENTRANTS, help="entrants to run now")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cameamp_study.jsonl")
    parser.add_argument("--commit", help="commit to name in the rows where the checkout has no git history")
    arguments = parser.parse_args(argv)
    recipe = replace(Recipe(), steps=arguments.steps, base_steps=arguments.base_steps)
    environment = {**describe("cpu", arguments.commit), "threads": 1}
    environment["versions"] |= {name: version(name) for name in ("diffusers", "peft", "scikit-image")}
    # one thread, as the runs: the base model is then the same wherever this machine trains it
    torch.set_num_threads(1)
    flux.prepare(recipe.base_steps, recipe.base_batch_size)

    def fill(cases: list[dict]) -> list[dict]:
        return ledger.fill(arguments.out, cases, run, environment, arguments.workers)

    def sweep_cases(names: list[str]) -> list[dict]:
        return [case(recipe, name, lr, report.SWEEP_SEED) for name in names if name in LRS for lr in LRS[name]]

    def final_cases(names: list[str], rows: list[dict]) -> list[dict]:
        return [case(recipe, name, report.tuned_lr(rows, name), seed) for seed in report.SEEDS for name in names]

    names = list(arguments.only)
    # the profile whose learning rate the entrant with float32 states takes
    tried = fill(sweep_cases(names if report.FLOAT32 not in names else list(dict.fromkeys([*names, "balanced"]))))
    fill(final_cases(names, tried))
    sweep = sweep_cases(list(LRS))
    have = [row for key, row in ledger.recorded(arguments.out).items() if key in {ledger.key(asked) for asked in sweep}]
    swept = [name for name in report.ENTRANTS if report.sweep(have, "balanced" if name == report.FLOAT32 else name)]
    rows = ledger.keep(arguments.out, [*sweep, *final_cases(swept, have)])
    return ledger.publish(rows, arguments.out, report)


if __name__ == "__main__":
    sys.exit(main())
