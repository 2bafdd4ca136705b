"""What the recorded rows say: the verdict, the table and the plot."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from .forms import COAT, CONTROL, FLOAT32, FORMS
from .works import WORKS

#: Most the mean final validation loss of a form may differ from float32's.
LOSS_TOLERANCE = 0.01
#: Least by how many dB the control's gradients lie below e4m3's, in every run, to be told apart by them.
CONTROL_GAP = 3.0
#: Most a form may save, as a share of what float32 saves of the same batch: more means that activations were not packed.
SAVED_SHARE = 0.7
SEEDS = (0, 1, 2)


def found(rows: list[dict], work: str, form: str) -> list[dict]:
    """The runs of a work in a form, in the order of their seeds."""
    return sorted((row for row in rows if (row["case"]["work"], row["case"]["form"]) == (work, form)), key=lambda row: row["case"]["seed"])


def typical(row: dict, of: str) -> float:
    """Median over a run's comparisons of the SQNR of its gradients: "all" or "worst". NaN if there was none."""
    return statistics.median(compared[of] for compared in row["sqnr"]) if row["sqnr"] else math.nan


def _mean(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def summary(rows: list[dict]) -> list[dict]:
    """An entry for each work and form with rows beside rows in float32: means over the seeds."""
    entries = []
    for work in WORKS:
        reference = found(rows, work, FLOAT32)
        for form in FORMS:
            runs = found(rows, work, form)
            if not runs or not reference:
                continue
            losses = [row["final_loss"] for row in runs]
            entries.append(
                {
                    "work": work,
                    "form": form,
                    "lr": runs[0]["case"]["lr"],
                    "seeds": [row["case"]["seed"] for row in runs],
                    "loss": statistics.mean(losses),
                    "relative": statistics.mean(losses) / _mean(reference, "final_loss") - 1,
                    "spread": (max(losses) - min(losses)) / statistics.mean(losses),
                    "all": [typical(row, "all") for row in runs],
                    "worst": [typical(row, "worst") for row in runs],
                    "saved": _mean(runs, "saved_bytes"),
                    "share": _mean(runs, "saved_bytes") / _mean(reference, "saved_bytes"),
                    "in_8_bits": min(row["saved_bytes_in_8_bits"] for row in runs),
                }
            )
    return entries


def verdict(rows: list[dict]) -> list[str]:
    """What does not hold; empty if the study is passed.

    On each work every form has run on all seeds, and all but float32 saved activations in 8 bits. The package's forms end within
    `LOSS_TOLERANCE` of float32. The control is told apart: by its loss, or by its gradients, `CONTROL_GAP` below e4m3's in every run.
    """
    failures = []
    entries = {(entry["work"], entry["form"]): entry for entry in summary(rows)}
    for work in WORKS:
        if short := [form for form in FORMS if entries.get((work, form), {}).get("seeds") != list(SEEDS)]:
            failures.append(f"{work}: {', '.join(short)}: not on seeds {list(SEEDS)}")
            continue
        for form in (*COAT, CONTROL):
            entry = entries[work, form]
            if not (entry["share"] <= SAVED_SHARE and entry["in_8_bits"]):
                failures.append(
                    f"{work}: {form}: saves {entry['share']:.2f} of float32's bytes, {entry['in_8_bits']} in 8 bits: not packed"
                )
        for form in COAT:
            entry = entries[work, form]
            if not abs(entry["relative"]) <= LOSS_TOLERANCE:
                failures.append(f"{work}: {form}: loss differs by {entry['relative']:+.2%}, {LOSS_TOLERANCE:.0%} allowed")
        control = entries[work, CONTROL]
        gaps = [ours - theirs for ours, theirs in zip(entries[work, "e4m3"]["all"], control["all"], strict=True)]
        if not (abs(control["relative"]) > LOSS_TOLERANCE or all(gap >= CONTROL_GAP for gap in gaps)):
            told = ", ".join(f"{gap:+.1f}" for gap in gaps)
            failures.append(f"{work}: the control cannot be told apart: loss {control['relative']:+.2%}, gradients {told} dB below e4m3's")
    return failures


def _range(values: list[float]) -> str:
    if any(math.isnan(value) for value in values):
        return "-"
    return f"{min(values):.1f} to {max(values):.1f}"


def markdown(rows: list[dict]) -> str:
    """The summary as a table."""
    lines = [
        "| work | form | lr | validation loss | against float32 | spread of seeds | SQNR of all gradients, dB | of the worst parameter "
        "| saved, share of float32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for e in summary(rows):
        cells = [e["work"], e["form"], f"{e['lr']:g}", f"{e['loss']:.4f}", f"{e['relative']:+.2%}", f"{e['spread']:.2%}"]
        cells += [_range(e["all"]), _range(e["worst"]), f"{e['saved'] / 2**20:.2f} MiB, {e['share']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "SQNR: median of each run's comparisons with a plain network of the same weights, lowest and highest seed."]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Difference of every seed and of the mean from float32, and the gradients' SQNR along the runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    others = FORMS[1:]
    relative = {(entry["work"], entry["form"]): entry["relative"] for entry in summary(rows)}
    figure, axes = plt.subplots(2, len(WORKS), figsize=(4.2 * len(WORKS), 6.4), sharey="row", layout="constrained")
    for (top, bottom), work in zip(axes.T, WORKS, strict=True):
        losses = {row["case"]["seed"]: row["final_loss"] for row in found(rows, work, FLOAT32)}
        for i, form in enumerate(others):
            runs = found(rows, work, form)
            pairs = [100 * (row["final_loss"] / losses[row["case"]["seed"]] - 1) for row in runs]
            top.plot(pairs, [i] * len(pairs), "o", color=f"C{i}", alpha=0.5, markersize=4)
            top.plot(100 * relative[work, form], i, "|", color=f"C{i}", markersize=18, markeredgewidth=2)
            for row in runs:
                for of, style in (("all", "-"), ("worst", ":")):
                    points = [(compared["step"], compared[of]) for compared in row["sqnr"]]
                    label = f"{form}, {of}" if row is runs[0] else None
                    bottom.plot(*zip(*points, strict=True), style, color=f"C{i}", linewidth=1, label=label)
        for bound in (-LOSS_TOLERANCE, LOSS_TOLERANCE):
            top.axvline(100 * bound, color="0.4", linestyle=":")
        top.set(
            title=work,
            xlabel="final loss against float32, %",
            yticks=range(len(others)),
            yticklabels=others,
            ylim=(len(others) - 0.5, -0.5),
        )
        bottom.set(xlabel="step")
    axes[1, 0].set(ylabel="SQNR of the gradients, dB")
    axes[1, 1].legend(fontsize=6, loc="lower left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
