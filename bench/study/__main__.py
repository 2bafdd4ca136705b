"""`python -m bench.study`: train the language model with every optimizer and write the rows and the plot.

Exit code 1 if the verdict fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from ..environment import ROOT, describe
from ..rows import write_jsonl
from . import report
from .data import digest, text
from .runs import study
from .train import Recipe

BETA2 = (0.95, 0.999)


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
