"""The table and the plot of a run's rows."""

from __future__ import annotations

import textwrap
from pathlib import Path

from .timing import QUIET_CORES

COLUMNS = ("work", "entrant", "ms", "vs torch", "B/param", "GB/s", "of copy", "state B", "reps", "note")


def _ratio(row: dict) -> float | None:
    return row.get("ratio_to_torch_fused") or row.get("ratio_to_torch_eager")


def _cells(row: dict) -> list[str]:
    note = row.get("error") or row.get("skipped") or ""
    if (row.get("other_cores") or 0.0) > QUIET_CORES:
        note = f"shared machine: {row['other_cores']:.1f} cores busy elsewhere"
    if "seconds" not in row:
        return [row["work"], row["entrant"], "-", "-", "-", "-", "-", "-", "-", note]
    ratio, state = _ratio(row), row.get("state_bytes_per_parameter")
    return [
        row["work"],
        row["entrant"],
        f"{row['seconds'] * 1e3:.3f}",
        f"{ratio:.2f}" if ratio else "-",
        f"{row['bytes_per_parameter']:.2f}",
        f"{row['gb_per_second']:.1f}",
        f"{row['share_of_copy']:.2f}",
        f"{state:.2f}" if state is not None else "-",
        str(row["repetitions"]),
        note,
    ]


def heading(environment: dict) -> str:
    """One line on the machine and the versions."""
    machine = f"{environment['gpu']}, driver {environment['driver']}" if "gpu" in environment else environment["cpu"]
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    commit, _, dirty = environment["commit"].partition("+")
    isa = environment.get("cpu_isa") or "no C++ extension"
    return f"{machine}, {environment['threads']} CPU threads, {isa}; {versions}; commit {commit[:10]}{'+' * bool(dirty)}{dirty}"


def markdown(rows: list[dict]) -> str:
    """The rows as a table, ratios against torch's fused AdamW (quantizers: against eager torch)."""
    lines = [heading(rows[0]["environment"]), "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in _cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def show(rows: list[dict]) -> None:
    """Prints the table; without rich, as markdown."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print(markdown(rows))
        return
    table = Table(*COLUMNS, caption=heading(rows[0]["environment"]))
    previous = None
    for row in rows:
        if previous not in (None, row["work"]):
            table.add_section()
        previous = row["work"]
        style = "bold" if row["entrant"].startswith("coat") else ("dim" if "seconds" not in row else None)
        table.add_row(*_cells(row), style=style)
    Console(width=None if Console().is_terminal else 170).print(table)


def plot(rows: list[dict], path: Path) -> None:
    """Bars of time against torch, one panel for each work; logarithmic, shorter is faster."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    works: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if _ratio(row):
            kind = "quantize" if row["kind"] == "dequantize" else row["kind"]
            works.setdefault((kind, row["work"]), []).append(row)
    if not works:
        return
    heights = [len(entries) for entries in works.values()]
    figure, axes = plt.subplots(
        len(works), 1, figsize=(9, 1.1 * len(works) + 0.28 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, ((kind, work), entries) in zip(axes[:, 0], works.items(), strict=True):
        entries = sorted(entries, key=_ratio, reverse=True)
        colours = ["#c44e52" if row["entrant"].startswith("coat") else "#8c9bb0" for row in entries]
        ratios = [_ratio(row) for row in entries]
        axis.barh([row["entrant"] for row in entries], ratios, color=colours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlim(min(0.2, min(ratios) / 1.5), max(4.0, max(ratios) * 9))
        for i, row in enumerate(entries):
            label = f"{ratios[i]:.2f}, {row['seconds'] * 1e3:.4g} ms, {row['share_of_copy']:.2f} of copy"
            axis.text(max(ratios[i], 1.0) * 1.05, i, label, va="center", fontsize=8)
        against = "torch AdamW(fused=True)" if kind == "step" else "eager torch"
        title = work if work.startswith(kind) else f"{kind}: {work}"
        axis.set_title(f"{title}, time / {against}", loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
    figure.suptitle(textwrap.fill(heading(rows[0]["environment"]), 120), fontsize=7)
    figure.savefig(path, dpi=140)
    plt.close(figure)
