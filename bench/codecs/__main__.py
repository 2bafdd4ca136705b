"""`python -m bench.codecs`: record, replay, write the rows, the page and the plot. Five to ten minutes on one core."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from ..environment import ROOT, describe
from ..rows import read_jsonl, write_jsonl
from . import measure, report
from .recordings import Recording, language, lora, straddling, synthetic
from .speed import speed_ratios
from .stores import FIRST, GROUP_SIZES, SECOND


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.codecs", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("speed", "page"), help="take the times, or write the page, again; the other rows of --out stay")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "codecs.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "codecs.md")
    parser.add_argument("--commit", help="commit to name in the rows where the checkout has no git history")
    arguments = parser.parse_args(argv)
    # one thread: small tensors gain nothing from two, and a recording then repeats to the bit
    torch.set_num_threads(1)
    began = time.perf_counter()

    def progress(line: str) -> None:
        print(f"[{time.perf_counter() - began:.0f} s] {line}", file=sys.stderr, flush=True)

    if arguments.only:
        rows = read_jsonl(arguments.out)
    else:
        rows = [{"kind": "environment", **describe("cpu", arguments.commit)}, *measured_rows(progress)]
        write_jsonl(rows, arguments.out)
    if arguments.only != "page":
        progress("times of the fused steps")
        rows = [row for row in rows if row["kind"] != "speed"] + speed_rows()
        write_jsonl(rows, arguments.out)
    report.plot(rows, arguments.out.with_suffix(".png"))
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(report.markdown(rows))
    progress(f"{arguments.page}, {arguments.out}")
    return 0


def measured_rows(progress: measure.Report) -> list[dict]:
    recordings: list[Recording] = []
    for record in (lora, language, straddling, synthetic):
        progress(f"recording {record.__name__}")
        recordings.append(record())
    rows = [recording.row() for recording in recordings]
    rows += measure.pair_rows(recordings, progress)
    rows += measure.width_rows(recordings)
    return rows + measure.range_rows(recordings, progress)


def speed_rows() -> list[dict]:
    pairs = [(m, v, size) for m in FIRST for v in SECOND for size in GROUP_SIZES if m.offered(size) and v.offered(size)]
    ratios, other_cores = speed_ratios(pairs)
    return [
        {"kind": "speed", "m": m.name, "v": v.name, "group_size": size, "ratio": float(f"{ratio:.3g}"), "other_cores": other_cores}
        for (m, v, size), ratio in ratios.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
