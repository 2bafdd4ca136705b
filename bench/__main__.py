"""`python -m bench`: measure the optimizers, the quantizers and the kernels on activations beside the peers installed, and write the rows.

Exit code 1 if a row of this package failed its check, 2 if the device is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from . import report
from .activation_rows import activation_rows
from .contests import CONTESTS
from .environment import ROOT, describe
from .quantize_rows import quantize_rows
from .rows import write_jsonl
from .step_rows import step_rows
from .works import ACTIVATION_WORKS, QUANTIZE_WORKS, STEP_WORKS, ActivationWork, QuantizeWork, StepWork

#: Kind of work -> what the progress line calls it, and what makes its rows.
RUNNERS: dict[type, tuple[str, Callable[..., list[dict]]]] = {
    StepWork: ("step", step_rows),
    QuantizeWork: ("quantize", quantize_rows),
    ActivationWork: ("activations", partial(activation_rows, contests=CONTESTS)),
}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--filter", default="", help="regular expression on work/entrant; torch's baseline always runs with it")
    parser.add_argument("--quick", action="store_true", help="small tensors: tries everything out, measures nothing worth quoting")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the interleaved contest (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds one entrant may take in all rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON lines (default: bench/results/<device>.jsonl); .md and .png go beside it")
    parser.add_argument("--commit", help="commit to name in the rows where the checkout has no git history")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> list[dict]:
    """All rows the arguments ask for."""
    pattern = re.compile(arguments.filter)
    names: list[str] = []

    def wanted(name: str) -> bool:
        names.append(name)
        return bool(pattern.search(name))

    rows: list[dict] = []
    works = [w for w in (*STEP_WORKS, *QUANTIZE_WORKS, *ACTIVATION_WORKS) if w.device == arguments.device]
    for work in works:
        what, run = RUNNERS[type(work)]
        work = work.quick() if arguments.quick else work
        print(f"measuring {work.name} ({what})", file=sys.stderr, flush=True)
        rounds = 3 if arguments.quick else arguments.rounds
        rows += run(work, wanted=wanted, rounds=rounds, budget_s=arguments.budget)
    if arguments.filter and not any(pattern.search(name) for name in names):
        raise SystemExit(f"--filter {arguments.filter!r} matches none of: {', '.join(names)}")
    return rows


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: use --device cpu, or run on a machine with an NVIDIA GPU and a CUDA build of torch", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    environment = describe(arguments.device, arguments.commit)
    rows = [{**row, "environment": environment} for row in measure(arguments)]
    out = arguments.out or ROOT / "bench" / "results" / f"{arguments.device}{'_quick' if arguments.quick else ''}.jsonl"
    write_jsonl(rows, out)
    out.with_suffix(".md").write_text(report.markdown(rows))
    report.show(rows)
    try:
        report.plot(rows, out.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"no plot: {error} (pip install matplotlib)", file=sys.stderr)
    print(f"rows: {out}")
    failed = [row for row in rows if "error" in row and row["entrant"].startswith("coat")]
    for row in failed:
        print(f"FAILED {row['work']} / {row['entrant']}: {row['error']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
