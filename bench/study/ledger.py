"""A file of rows that grows as runs finish: a run that is recorded is not done again.

A row is {"case": what was asked, "environment": where it ran} and what the run returned. The case alone says whether a row exists,
not the commit: delete the file to measure everything anew.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType

import torch

from ..rows import read_jsonl, write_jsonl


def key(case: dict) -> str:
    """The same for equal cases, before and after JSON."""
    return json.dumps(case, sort_keys=True)


def recorded(path: Path) -> dict[str, dict]:
    """Rows of the file by the key of their case; empty if there is no file."""
    return {key(row["case"]): row for row in read_jsonl(path)} if path.exists() else {}


def _one_thread() -> None:
    # matrices this small gain nothing from two threads, and runs then repeat to the bit
    torch.set_num_threads(1)


def fill(path: Path, cases: list[dict], run: Callable[[dict], dict], environment: dict, workers: int) -> list[dict]:
    """Do the runs that the file lacks and append each when it ends; the rows of all cases, in their order.

    Args:
        path: of the rows.
        cases: what to run: plain dicts that survive JSON.
        run: a function of a module that a spawned process can import; one case in, the results out.
        environment: goes into every new row.
        workers: runs at a time, one thread each.
    """
    have = recorded(path)
    missing = [case for case in cases if key(case) not in have]
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    # spawned, not forked: a forked child inherits torch's thread pools without their threads
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread)
    with pool, path.open("a", encoding="utf-8") as file:
        futures = {pool.submit(run, case): case for case in missing}
        for done, future in enumerate(as_completed(futures), 1):
            case = futures[future]
            row = {"case": case, **future.result(), "environment": environment}
            have[key(case)] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            named = ", ".join(f"{name} {value}" for name, value in case.items() if not isinstance(value, dict))
            elapsed = time.perf_counter() - began
            print(f"[{done}/{len(missing)}, {elapsed:.0f} s] {named}: {row['final_loss']:.4f}", file=sys.stderr, flush=True)
    return [have[key(case)] for case in cases]


def keep(path: Path, cases: Iterable[dict]) -> list[dict]:
    """Rewrite the file with the rows of these cases alone, in their order; cases without a row are left out."""
    have = recorded(path)
    rows = [have[key(case)] for case in cases if key(case) in have]
    write_jsonl(rows, path)
    return rows


def publish(rows: list[dict], path: Path, report: ModuleType) -> int:
    """Draw the plot and write the table beside the rows' file, print the table and what the verdict finds; the exit code.

    Args:
        report: a module with `plot`, `markdown` and `verdict`.
    """
    report.plot(rows, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(report.markdown(rows))
    print(report.markdown(rows))
    failures = report.verdict(rows)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0
