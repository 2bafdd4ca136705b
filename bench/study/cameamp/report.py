"""What the recorded rows say: the tuned learning rates, the verdict, the table and the plot."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from .entrants import FLOAT32, LRS, PROFILES, REFERENCE

#: Most that a profile's mean evaluation loss may lie above tuned AdamW's.
LOSS_TOLERANCE = 0.03
#: Most bytes of state a parameter after the warm-up, half of AdamW's: more means that the states are not in 8 bits.
STATE_BYTES = 4.0
SEEDS = (0, 1, 2)
#: The learning rates are tuned on another seed than those that are judged.
SWEEP_SEED = 100
ENTRANTS = (*LRS, FLOAT32)


def sweep(rows: list[dict], name: str) -> dict[float, float]:
    """Final loss at each learning rate tried; not finite counts as infinite."""
    found = [row for row in rows if row["case"]["optimizer"] == name and row["case"]["seed"] == SWEEP_SEED]
    losses = {row["case"]["lr"]: row["final_loss"] for row in found}
    return {lr: losses[lr] if math.isfinite(losses[lr]) else math.inf for lr in sorted(losses)}


def tuned_lr(rows: list[dict], name: str) -> float:
    """The best learning rate of an entrant's sweep; that with float32 states takes its profile's."""
    losses = sweep(rows, "balanced" if name == FLOAT32 else name)
    return min(losses, key=losses.__getitem__)


def judged(rows: list[dict], name: str) -> list[dict]:
    """Rows of an entrant at its tuned learning rate, in the order of their seeds."""
    if not sweep(rows, "balanced" if name == FLOAT32 else name):
        return []
    lr = tuned_lr(rows, name)
    found = [row for row in rows if row["case"]["optimizer"] == name and row["case"]["lr"] == lr and row["case"]["seed"] in SEEDS]
    return sorted(found, key=lambda row: row["case"]["seed"])


def _mean(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def summary(rows: list[dict]) -> list[dict]:
    """Means over the seeds, an entry for each entrant with rows."""
    entries = []
    reference = judged(rows, REFERENCE)
    for name in ENTRANTS:
        if not (found := judged(rows, name)):
            continue
        losses = [row["final_loss"] for row in found]
        entries.append(
            {
                "optimizer": name,
                "lr": found[0]["case"]["lr"],
                "seeds": [row["case"]["seed"] for row in found],
                "loss": statistics.mean(losses),
                "base_loss": _mean(found, "base_loss"),
                "relative": statistics.mean(losses) / _mean(reference, "final_loss") - 1 if reference else math.nan,
                "spread": (max(losses) - min(losses)) / statistics.mean(losses),
                "bytes": _mean(found, "state_bytes_per_parameter"),
                "early_bytes": _mean(found, "state_bytes_per_parameter_early"),
            }
        )
    return entries


def verdict(rows: list[dict]) -> list[str]:
    """What does not hold; empty if the study is passed.

    AdamW is tuned: its best learning rate lies inside the sweep, and its worst one would fail, so that the tolerance tells good training
    from bad. Every profile, its states in 8 bits, ends at most `LOSS_TOLERANCE` above it.
    """
    of = {entry["optimizer"]: entry for entry in summary(rows)}
    failures = [f"{name}: not on seeds {list(SEEDS)}" for name in (REFERENCE, *PROFILES) if of.get(name, {}).get("seeds") != list(SEEDS)]
    if failures:
        return failures
    reference = of[REFERENCE]
    if reference["lr"] in (min(tried := sweep(rows, REFERENCE)), max(tried)):
        failures.append(f"{REFERENCE}: the best learning rate, {reference['lr']:g}, ends the sweep: it is not tuned")
    if not max(tried.values()) > (1 + LOSS_TOLERANCE) * min(tried.values()):
        failures.append(f"{REFERENCE}: all learning rates end within {LOSS_TOLERANCE:.0%}: the comparison says nothing")
    for name in PROFILES:
        entry = of[name]
        if not entry["relative"] <= LOSS_TOLERANCE:
            failures.append(f"{name}: loss lies {entry['relative']:+.2%} from {REFERENCE}'s, {LOSS_TOLERANCE:+.0%} allowed")
        if not entry["bytes"] <= STATE_BYTES:
            failures.append(f"{name}: {entry['bytes']:.2f} state bytes a parameter after the warm-up, {STATE_BYTES:g} allowed")
    return failures


def markdown(rows: list[dict]) -> str:
    """The summary and the sweep as tables."""
    lines = [
        "| optimizer | lr | validation loss | against AdamW | spread of seeds | state bytes a parameter, first quarter | at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in summary(rows):
        losses = f"{e['loss']:.4f} | {e['relative']:+.2%} | {e['spread']:.2%}"
        lines.append(f"| {e['optimizer']} | {e['lr']:g} | {losses} | {e['early_bytes']:.2f} | {e['bytes']:.2f} |")
    lines += ["", f"Without a LoRA: {_mean(rows, 'base_loss'):.4f}. Learning rates, seed {SWEEP_SEED}: final loss of each.", ""]
    lines += ["| optimizer | lr: loss |", "|---|---|"]
    for name in LRS:
        cells = [f"{lr:g}: {loss:.4f}" for lr, loss in sweep(rows, name).items()]
        lines.append(f"| {name} | {', '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """The sweeps, and every entrant's training loss at its tuned learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.8), layout="constrained")
    for i, name in enumerate(ENTRANTS):
        if name in LRS:
            losses = sweep(rows, name)
            left.plot(list(losses), list(losses.values()), "o-", color=f"C{i}", label=name)
        if found := judged(rows, name):
            mean = [statistics.mean(values) for values in zip(*(row["losses"] for row in found), strict=True)]
            window = max(1, len(mean) // 20)
            smooth = [statistics.mean(mean[max(0, k - window) : k + 1]) for k in range(len(mean))]
            right.plot(smooth, color=f"C{i}", label=f"{name}, lr {found[0]['case']['lr']:g}")
    left.set(title=f"final validation loss, seed {SWEEP_SEED}", xlabel="learning rate", xscale="log")
    right.set(title="training loss, mean of the seeds", xlabel="step", yscale="log")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
