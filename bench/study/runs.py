"""All runs of the study, several at a time.

Not in `__main__`: a spawned process does not import that module, and would find no function to call.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product

import torch

from .data import split, text
from .optimizers import OPTIMIZERS
from .report import typical_error
from .train import Recipe, run


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
                f"loss {rows[case]['final_loss']:.4f}, update error {typical_error(rows[case]):.2g}",
                file=sys.stderr,
                flush=True,
            )
    return [rows[case] for case in cases]
