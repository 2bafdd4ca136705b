"""What the recorded rows say: the tuned learning rates, the verdict, the table and the plot."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from .entrants import FAMILIES, FLOAT32
from .works import WORKS

#: Most the mean final validation loss of an 8-bit form may differ from its float32 form's.
LOSS_TOLERANCE = 0.01
#: Most bytes of state an 8-bit form may keep, as a share of the float32 form's: more means that it ran in float32 after all.
STATE_SHARE = 0.6
SEEDS = (0, 1, 2)
#: The learning rates are tuned on another seed than those that are judged.
SWEEP_SEED = 100


def _rows(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row["case"][name] == value for name, value in wanted.items())]


def sweep(rows: list[dict], work: str, family: str) -> dict[float, float]:
    """Final loss at each learning rate tried, float32 form; not finite counts as infinite."""
    found = _rows(rows, work=work, optimizer=family, form=FLOAT32, seed=SWEEP_SEED)
    losses = {row["case"]["lr"]: row["final_loss"] for row in found}
    return {lr: losses[lr] if math.isfinite(losses[lr]) else math.inf for lr in sorted(losses)}


def tuned_lr(rows: list[dict], work: str, family: str) -> float:
    """The best learning rate of the sweep."""
    losses = sweep(rows, work, family)
    return min(losses, key=losses.__getitem__)


def _mean(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def summary(rows: list[dict]) -> list[dict]:
    """An entry for each work, optimizer and 8-bit form; only rows at the tuned learning rate count."""
    entries = []
    for work in WORKS:
        for name, family in FAMILIES.items():
            if not sweep(rows, work, name):
                entries.append({"work": work, "optimizer": name, "form": None, "seeds": [], "reference_seeds": []})
                continue
            lr = tuned_lr(rows, work, name)
            judged = [row for row in _rows(rows, work=work, optimizer=name, lr=lr) if row["case"]["seed"] in SEEDS]
            reference = _rows(judged, form=FLOAT32)
            for form in family.forms:
                found = _rows(judged, form=form)
                entry = {
                    "work": work,
                    "optimizer": name,
                    "form": form,
                    "lr": lr,
                    "seeds": sorted(row["case"]["seed"] for row in found),
                    "reference_seeds": sorted(row["case"]["seed"] for row in reference),
                }
                if found and reference:
                    losses = [row["final_loss"] for row in reference]
                    entry["float32_loss"], entry["loss"] = statistics.mean(losses), _mean(found, "final_loss")
                    entry["relative"] = entry["loss"] / entry["float32_loss"] - 1
                    entry["spread"] = (max(losses) - min(losses)) / entry["float32_loss"]
                    entry["float32_bytes"], entry["bytes"] = (_mean(x, "state_bytes_per_parameter") for x in (reference, found))
                entries.append(entry)
    return entries


def verdict(rows: list[dict]) -> list[str]:
    """What does not hold; empty if the study is passed.

    Every 8-bit form of every optimizer has run on both works and all seeds, with its states really in 8 bits, and ends within
    `LOSS_TOLERANCE` of its float32 form.
    """
    failures = []
    for entry in summary(rows):
        name = f"{entry['work']}: {entry['optimizer']} {entry['form'] or ''}".strip()
        if not entry["seeds"] == entry["reference_seeds"] == list(SEEDS):
            failures.append(f"{name}: seeds {entry['seeds']} and, in float32, {entry['reference_seeds']}, {list(SEEDS)} needed")
            continue
        if not abs(entry["relative"]) <= LOSS_TOLERANCE:
            failures.append(f"{name}: loss differs by {entry['relative']:+.2%}, {LOSS_TOLERANCE:.0%} allowed")
        if not entry["bytes"] <= STATE_SHARE * entry["float32_bytes"]:
            failures.append(f"{name}: {entry['bytes']:.2f} state bytes a parameter beside {entry['float32_bytes']:.2f}: not in 8 bits")
    return failures


def markdown(rows: list[dict]) -> str:
    """The summary and the sweep as tables."""
    lines = [
        "| work | optimizer | 8-bit form | lr | float32 loss | 8-bit loss | difference | spread of seeds | state bytes a parameter |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for e in summary(rows):
        if "relative" not in e:
            continue
        losses = f"{e['float32_loss']:.4f} | {e['loss']:.4f} | {e['relative']:+.2%} | {e['spread']:.2%}"
        bytes_each = f"{e['bytes']:.2f} (float32: {e['float32_bytes']:.2f})"
        lines.append(f"| {e['work']} | {e['optimizer']} | {e['form']} | {e['lr']:g} | {losses} | {bytes_each} |")
    lines += [
        "",
        f"Learning rates, float32 form, seed {SWEEP_SEED}: final loss of each.",
        "",
        "| work | optimizer | lr: loss |",
        "|---|---|---|",
    ]
    for work in WORKS:
        for name in FAMILIES:
            if losses := sweep(rows, work, name):
                cells = [f"{lr:g}: {loss:.4f}" for lr, loss in losses.items()]
                lines.append(f"| {work} | {name} | {', '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Difference of every seed and of the mean from the float32 form, beside how far that form's own seeds lie apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(WORKS), figsize=(5.5 * len(WORKS), 4), sharex=True, sharey=True, layout="constrained")
    entries = [entry for entry in summary(rows) if "relative" in entry]
    labels = list(dict.fromkeys(f"{entry['optimizer']} {entry['form']}" for entry in entries))
    for axis, work in zip(axes, WORKS, strict=True):
        for entry in (entry for entry in entries if entry["work"] == work):
            y = labels.index(f"{entry['optimizer']} {entry['form']}")
            runs = _rows(rows, work=work, optimizer=entry["optimizer"], lr=entry["lr"])
            losses = {(row["case"]["form"], row["case"]["seed"]): row["final_loss"] for row in runs}
            seeds = [seed for seed in entry["seeds"] if seed in entry["reference_seeds"]]
            pairs = [100 * (losses[entry["form"], seed] / losses[FLOAT32, seed] - 1) for seed in seeds]
            axis.barh(y, 100 * entry["spread"], left=-50 * entry["spread"], height=0.7, color="0.88")
            axis.plot(pairs, [y] * len(pairs), "o", color="C0", alpha=0.5, markersize=4)
            axis.plot(100 * entry["relative"], y, "|", color="C3", markersize=18, markeredgewidth=2)
        for bound in (-LOSS_TOLERANCE, LOSS_TOLERANCE):
            axis.axvline(100 * bound, color="0.4", linestyle=":")
        axis.set(title=work, xlabel="8-bit against float32 states, final loss, %", yticks=range(len(labels)), yticklabels=labels)
    axes[0].invert_yaxis()
    figure.suptitle("red: mean of three seeds; dots: each; grey: spread of the float32 seeds; dotted: the tolerance", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
