"""What the recorded rows say: the verdict, the table and the plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from .optimizers import CONTROL, OPTIMIZERS, REFERENCE

#: Most the mean validation loss may differ from float32 AdamW's.
LOSS_TOLERANCE = 0.005
#: How much larger the control's update error must be to count as told apart, in every pair of seeds.
CONTROL_FACTOR = 1.3


def typical_error(row: dict) -> float:
    """Median update error of the second half of a run, where the moments have settled."""
    errors = [error for _, error in row["update_error"]]
    return statistics.median(errors[len(errors) // 2 :])


def _by_optimizer(rows: list[dict], beta2: float, value: Callable[[dict], float]) -> dict[str, list[float]]:
    chosen = sorted((row for row in rows if row["beta2"] == beta2), key=lambda row: row["seed"])
    return {name: [value(row) for row in chosen if row["optimizer"] == name] for name in OPTIMIZERS}


def summary(rows: list[dict]) -> list[dict]:
    """Mean losses and errors over the seeds, one entry for each beta2 and optimizer."""
    entries = []
    for beta2 in sorted({row["beta2"] for row in rows}):
        final = _by_optimizer(rows, beta2, lambda row: row["final_loss"])
        best = _by_optimizer(rows, beta2, lambda row: row["best_loss"])
        error = _by_optimizer(rows, beta2, typical_error)
        reference = statistics.mean(final[REFERENCE])
        for name in OPTIMIZERS:
            entries.append(
                {
                    "beta2": beta2,
                    "optimizer": name,
                    "seeds": len(final[name]),
                    "final_loss": statistics.mean(final[name]),
                    "best_loss": statistics.mean(best[name]),
                    "difference": statistics.mean(final[name]) - reference,
                    "relative": statistics.mean(final[name]) / reference - 1,
                    "spread": max(final[name]) - min(final[name]),
                    "errors": error[name],
                }
            )
    return entries


def verdict(rows: list[dict], seeds: int = 3) -> list[str]:
    """What does not hold; empty if the study is passed.

    For each beta2: every FP8AdamW's mean final loss within `LOSS_TOLERANCE` of torch's and no further from it than torch's
    own seeds lie apart; the control told apart from each of them, by its loss or by its update error.
    """
    failures = []
    entries = summary(rows)
    for beta2 in sorted({entry["beta2"] for entry in entries}):
        of = {entry["optimizer"]: entry for entry in entries if entry["beta2"] == beta2}
        if short := [name for name, entry in of.items() if entry["seeds"] != seeds]:
            failures.append(f"beta2 {beta2}: {', '.join(short)}: not {seeds} seeds")
            continue
        spread, control = of[REFERENCE]["spread"], of[CONTROL]
        for name in OPTIMIZERS:
            if name in (REFERENCE, CONTROL):
                continue
            entry = of[name]
            if not abs(entry["relative"]) <= LOSS_TOLERANCE:
                failures.append(f"beta2 {beta2}: {name}: loss differs by {entry['relative']:+.2%}, {LOSS_TOLERANCE:.1%} allowed")
            if not abs(entry["difference"]) <= spread:
                failures.append(f"beta2 {beta2}: {name}: loss differs by {entry['difference']:+.4f}, torch's seeds by {spread:.4f}")
            by_loss = abs(control["relative"]) > LOSS_TOLERANCE and abs(control["difference"]) > spread
            by_error = min(control["errors"]) > CONTROL_FACTOR * max(entry["errors"])
            if not (by_loss or by_error):
                failures.append(f"beta2 {beta2}: the control cannot be told from {name}")
    return failures


def markdown(rows: list[dict]) -> str:
    """The summary as a table."""
    lines = [
        "| beta2 | optimizer | final loss | best loss | against torch | spread of seeds | update error |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in summary(rows):
        errors = f"{min(e['errors']):.2g} to {max(e['errors']):.2g}"
        cells = [f"{e['beta2']:g}", e["optimizer"], f"{e['final_loss']:.4f}", f"{e['best_loss']:.4f}", f"{e['relative']:+.3%}"]
        lines.append("| " + " | ".join([*cells, f"{e['spread']:.4f}", errors]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Validation loss and update error along the runs, mean over seeds with each seed thin behind it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    betas = sorted({row["beta2"] for row in rows})
    figure, axes = plt.subplots(2, len(betas), figsize=(5.2 * len(betas), 7), squeeze=False, layout="constrained")
    for column, beta2 in enumerate(betas):
        for i, name in enumerate(OPTIMIZERS):
            runs = [row for row in rows if row["beta2"] == beta2 and row["optimizer"] == name]
            for axis, key in zip(axes[:, column], ("curve", "update_error"), strict=True):
                for row in runs:
                    axis.plot(*zip(*row[key], strict=True), color=f"C{i}", linewidth=0.5, alpha=0.5)
                means = [statistics.mean(values) for values in zip(*([v for _, v in row[key]] for row in runs), strict=True)]
                axis.plot([step for step, _ in runs[0][key]], means, color=f"C{i}", label=name)
        axes[0, column].set(title=f"beta2 = {beta2:g}", ylabel="validation loss, nats a byte", xlabel="step")
        axes[1, column].set(ylabel="update error against float32 AdamW", xlabel="step", yscale="log")
        axes[1, column].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
