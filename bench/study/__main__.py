"""`python -m bench.study`: train the language model with every optimizer and write the rows and the plot.

Exit code 1 if the verdict fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from ..environment import ROOT, describe
from ..rows import write_jsonl
from . import report
from .data import digest, split, text
from .optimizers import OPTIMIZERS
from .train import Recipe, run

BETA2 = (0.95, 0.999)


def _run_one(recipe: Recipe, name: str, seed: int, beta2: float) -> dict:
    # one thread a run: small matrices gain nothing from two, and runs then repeat to the bit
    torch.set_num_threads(1)
    return run(recipe, name, seed, beta2, *split(text()))


def study(recipe: Recipe, seeds: int, betas: tuple[float, ...], workers: int) -> list[dict]:
    """All runs, `workers` at a time, in the order of beta2, seed and optimizer."""
    cases = list(product(betas, range(seeds), OPTIMIZERS))
    rows: dict[tuple, dict] = {}
    began = time.perf_counter()
    # spawned, not forked: a forked child inherits torch's thread pools without their threads
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_run_one, recipe, name, seed, beta2): (beta2, seed, name) for beta2, seed, name in cases}
        for done in as_completed(futures):
            case = futures[done]
            rows[case] = done.result()
            elapsed = time.perf_counter() - began
            print(
                f"[{len(rows)}/{len(cases)}, {elapsed:.0f} s] {case[2]}, beta2 {case[0]:g}, seed {case[1]}: "
                f"loss {rows[case]['final_loss']:.4f}, update error {report.typical_error(rows[case]):.2g}",
                file=sys.stderr,
                flush=True,
            )
    return [rows[case] for case in cases]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "study_pydoc.jsonl")
    parser.add_argument("--commit", help="commit to name in the rows where the checkout has no git history")
    arguments = parser.parse_args(argv)
    environment = {**describe("cpu", arguments.commit), "threads": 1, "text": digest(text())}
    recipe = replace(Recipe(), steps=arguments.steps)
    rows = [{**row, "environment": environment} for row in study(recipe, arguments.seeds, BETA2, arguments.workers)]
    write_jsonl(rows, arguments.out)
    report.plot(rows, arguments.out.with_suffix(".png"))
    arguments.out.with_suffix(".md").write_text(report.markdown(rows))
    print(report.markdown(rows))
    failures = report.verdict(rows, arguments.seeds)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
