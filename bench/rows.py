"""What rows of every kind share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .timing import Times


def chosen(work: str, entrants, baseline, wanted) -> list:
    """The entrants `wanted` by "work/entrant", the baseline among them if there are any."""
    names = {entrant.name for entrant in entrants if wanted(f"{work}/{entrant.name}")}
    return [entrant for entrant in entrants if names and (entrant is baseline or entrant.name in names)]


def dtype_name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reason(error: BaseException) -> str:
    """One line for the row of an entrant that cannot run."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}"


def measured(times: Times, numel: int, bytes_each: float, copy_rate: float) -> dict:
    """The columns that follow from an entrant's times.

    Args:
        times: of one run over `numel` elements.
        bytes_each: moved for each element, the floor: everything read once and written once.
        copy_rate: bytes a second of the copy measured in the same rounds.
    """
    rate = bytes_each * numel / times.median
    return {
        "seconds": times.median,
        "quartiles": times.quartiles,
        "repetitions": len(times.by_round),
        "ns_per_parameter": times.median / numel * 1e9,
        "bytes_per_parameter": bytes_each,
        "gb_per_second": rate / 1e9,
        "copy_gb_per_second": copy_rate / 1e9,
        "share_of_copy": rate / copy_rate,
    }


def write_jsonl(rows: Iterable[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]
