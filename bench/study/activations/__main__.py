"""`python -m bench.study.activations`: train every work in every form; write rows, table and plot.

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
from ...rows import read_jsonl
from .. import flux, ledger
from ..cameamp import report as cameamp
from ..data import digest, text
from ..family import report as family
from . import report
from .forms import FORMS
from .train import case, run
from .works import WORKS, FluxLoRA

RESULTS = ROOT / "bench" / "results"


def learning_rates() -> dict[str, float]:
    """AdamW's for each work, tuned in float32 by the studies that have the work recorded."""
    rows = read_jsonl(RESULTS / "family_study.jsonl")
    tuned = {work: family.tuned_lr(rows, work, "FP8AdamW") for work in family.WORKS}
    return {**tuned, FluxLoRA.name: cameamp.tuned_lr(read_jsonl(RESULTS / "cameamp_study.jsonl"), cameamp.REFERENCE)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study.activations", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps a run (default: each work's own)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "activation_study.jsonl")
    parser.add_argument("--commit", help="commit to name in the rows where the checkout has no git history")
    arguments = parser.parse_args(argv)
    works = [replace(work(), steps=arguments.steps) if arguments.steps else work() for work in WORKS.values()]
    environment = {**describe("cpu", arguments.commit), "threads": 1, "text": digest(text())}
    environment["versions"] |= {name: version(name) for name in ("diffusers", "peft", "scikit-image", "scikit-learn")}
    # one thread, as the runs: the base model is then the same wherever this machine trains it
    torch.set_num_threads(1)
    for work in works:
        if isinstance(work, FluxLoRA):
            flux.prepare(work.base_steps, work.base_batch_size)
    lrs = learning_rates()
    cases = [case(work, form, lrs[work.name], seed) for work in works for seed in report.SEEDS for form in FORMS]
    ledger.fill(arguments.out, cases, run, environment, arguments.workers)
    return ledger.publish(ledger.keep(arguments.out, cases), arguments.out, report)


if __name__ == "__main__":
    sys.exit(main())
