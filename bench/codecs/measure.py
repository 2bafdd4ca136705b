"""The rows of the table: every pair of codecs, what rounding does in the long run, and where to cut a group's range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from unittest.mock import patch

import torch

from coat_kernels.formats import reference
from coat_kernels.formats.codecs import MAX_OCTAVES

from .recordings import Recording
from .replay import BETA2, METRICS, SLOW_BETA2, Schedule, Track, compare, drift, follow, octaves, off
from .stores import DEFAULT_GROUP_SIZE, FIRST, GROUP_SIZES, SECOND, Store

EXACT_FIRST, EXACT_SECOND = FIRST[0], SECOND[0]
RANGE_CAPS = (20, 24, 28, 32, 36, 40)
WIDTH_QUANTILES = (0.5, 0.9, 0.99, 1.0)

Report = Callable[[str], None]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def cell(recording: str, beta2: float) -> str:
    """How a row names one recording replayed with one beta2."""
    return f"{recording} {beta2:g}"


class Replay:
    """A recording with its exact moments, beside which codecs are measured."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.schedule = Schedule.over(len(recording.grads))
        self.exact_first = follow(recording, EXACT_FIRST, 0, self.schedule, None)
        self.exact_second = follow(recording, EXACT_SECOND, 0, self.schedule, None)

    def track(self, store: Store, group_size: int) -> Track:
        exact = self.exact_first if store.signed else self.exact_second
        return follow(self.recording, store, group_size, self.schedule, exact.running)

    def cells(self, first: Track, second: Track) -> dict[str, list[float]]:
        """The metrics of a pair in the order of `replay.METRICS`, for each beta2."""
        cells = {}
        for beta2 in BETA2:
            metrics = compare(first, second, self.exact_first, self.exact_second, self.schedule, beta2)
            cells[cell(self.recording.name, beta2)] = [_rounded(metrics[name]) for name in METRICS]
        return cells

    def rounding_row(self, store: Store, track: Track, group_size: int) -> dict:
        """A second moment beside a float32 first moment, as the recording goes on."""
        row = {"kind": "rounding", "v": store.codec, "rounding": store.rounding, "group_size": group_size}
        row |= {"recording": self.recording.name, "beta2": SLOW_BETA2, "steps": list(self.schedule.marks)}
        marks = [(self.exact_second, step, SLOW_BETA2) for step in self.schedule.marks]
        row["error"] = [_rounded(off(self.exact_first, track, *mark)) for mark in marks]
        row["drift"] = [_rounded(drift(track, *mark)) for mark in marks]
        return row


def pair_rows(
    recordings: Sequence[Recording],
    report: Report,
    *,
    firsts: Sequence[Store] = FIRST,
    seconds: Sequence[Store] = SECOND,
    group_sizes: Sequence[int] = GROUP_SIZES,
) -> list[dict]:
    """One row a pair and group size, its metrics on each recording and beta2, and behind them one a second moment, for its rounding.

    Where neither of a pair has groups, its group size is None.
    """
    rows: dict[tuple[Store, Store, int | None], dict] = {}
    rounding = []
    for recording in recordings:
        replay = Replay(recording)
        tracks: dict[Store, Track] = {}
        for size in group_sizes:
            report(f"{recording.name}, groups of {size}")
            for store in (*firsts, *seconds):
                if store.grouped or store not in tracks:
                    tracks.pop(store, None)
                    if store.offered(size):
                        tracks[store] = replay.track(store, size)
            for first, second in product(firsts, seconds):
                at = size if first.grouped or second.grouped else None
                if first in tracks and second in tracks and (at or size == group_sizes[0]):
                    row = rows.setdefault((first, second, at), _pair_row(first, second, at))
                    row["cells"] |= replay.cells(tracks[first], tracks[second])
            if size == DEFAULT_GROUP_SIZE:
                judged = [v for v in seconds if v in tracks and v != EXACT_SECOND and not v.flushes]
                rounding += [replay.rounding_row(store, tracks[store], size) for store in judged]
    return [*rows.values(), *rounding]


def _pair_row(first: Store, second: Store, group_size: int | None) -> dict:
    size = group_size or GROUP_SIZES[0]
    return {
        "kind": "pair",
        "m": first.name,
        "v": second.name,
        "group_size": group_size,
        "bytes": first.bytes_per_element(size) + second.bytes_per_element(size),
        "control": second.flushes,
        "cells": {},
    }


def range_rows(
    recordings: Sequence[Recording], report: Report, *, caps: Sequence[int] = RANGE_CAPS, group_sizes: Sequence[int] = (DEFAULT_GROUP_SIZE,)
) -> list[dict]:
    """e4m3 with expansion in both moments, with groups cut at other widths than the package's."""
    rows: dict[tuple[int, int], dict] = {}
    first, second = (Store("e4m3_expand", signed) for signed in (True, False))
    for recording in recordings:
        replay = Replay(recording)
        for cap in caps:
            report(f"{recording.name}, groups cut at {cap} octaves")
            # the cap is no option of the package: one number of the format, changed here alone to justify it
            with patch.object(reference, "MAX_OCTAVES", cap):
                for size in group_sizes:
                    row = rows.setdefault((cap, size), _range_row(cap, size))
                    tracks = replay.track(first, size), replay.track(second, size)
                    row["cells"] |= replay.cells(*tracks)
    return list(rows.values())


def _range_row(cap: int, group_size: int) -> dict:
    return {"kind": "range_cap", "octaves": cap, "group_size": group_size, "used": cap == MAX_OCTAVES, "cells": {}}


def width_rows(recordings: Sequence[Recording], *, group_sizes: Sequence[int] = GROUP_SIZES) -> list[dict]:
    """How many octaves lie between the largest and the smallest non-zero magnitude of a group, over the late steps."""
    rows = []
    for recording in recordings:
        replay = Replay(recording)
        for name, track in (("m", replay.exact_first), ("v", replay.exact_second)):
            for size in group_sizes:
                found = octaves(track, replay.schedule, size)
                quantiles = [_rounded(value) for value in found.quantile(torch.tensor(WIDTH_QUANTILES)).tolist()]
                rows.append({"kind": "width", "recording": recording.name, "moment": name, "group_size": size, "quantiles": quantiles})
    return rows
