"""How the demo shows its results: the table, the picture, the notes beside the files."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from .data import HELD_OUT, PHOTOGRAPHS
from .measure import quantized_share, state_bytes_per_parameter
from .training import Run

SMOOTHING = 20  # steps


@dataclass(frozen=True)
class Result:
    """One line of the closing table.

    Attributes:
        loss: mean training loss of the last `SMOOTHING` steps.
        evaluation: loss on crops that were not trained on, with fixed noise.
        state_bytes: optimizer state bytes for each parameter.
        quantized: share of the moments' elements kept in one byte.
        optimizer_ms, step_ms: medians.
    """

    name: str
    loss: float
    evaluation: float
    state_bytes: float
    quantized: float
    optimizer_ms: float
    step_ms: float

    @classmethod
    def of(cls, run: Run, evaluation: float) -> Result:
        return cls(
            name=run.name,
            loss=statistics.fmean(run.losses[-SMOOTHING:]),
            evaluation=evaluation,
            state_bytes=state_bytes_per_parameter(run.optimizer),
            quantized=quantized_share(run.optimizer),
            optimizer_ms=statistics.median(run.optimizer_ms),
            step_ms=statistics.median(run.step_ms),
        )


def result_table(results: list[Result], without_lora: float) -> Table:
    """The closing table, one column an optimizer.

    Args:
        without_lora: evaluation loss of the base model on the held-out class.
    """
    table = Table(title=f"LoRA for the held-out class '{HELD_OUT}'")
    table.add_column("")
    for result in results:
        table.add_column(result.name, justify="right")
    rows = (
        (f"training loss, mean of the last {SMOOTHING} steps", "loss", "{:.4f}"),
        (f"evaluation loss ({without_lora:.4f} without LoRA)", "evaluation", "{:.4f}"),
        ("state bytes for each parameter", "state_bytes", "{:.2f}"),
        ("share of state elements quantized", "quantized", "{:.0%}"),
        ("time of optimizer.step(), median ms", "optimizer_ms", "{:.2f}"),
        ("time of a whole training step, median ms", "step_ms", "{:.1f}"),
    )
    for label, attribute, form in rows:
        table.add_row(label, *(form.format(getattr(result, attribute)) for result in results))
    return table


def _smooth(losses: list[float]) -> np.ndarray:
    """Running mean over the last `SMOOTHING` steps, fewer at the start."""
    total = np.cumsum(losses)
    window = np.minimum(np.arange(1, len(losses) + 1), SMOOTHING)
    return (total - np.concatenate([np.zeros(len(losses)), total])[len(losses) - window + np.arange(len(losses))]) / window


def _strip(images: Tensor) -> np.ndarray:
    """Images [n, 3, h, w] in -1 .. 1 side by side, one white pixel between them, as [h, width, 3] in 0 .. 1."""
    pixels = (images.clamp(-1, 1).permute(0, 2, 3, 1).numpy() + 1) / 2
    framed = np.pad(pixels, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=1.0)
    return np.concatenate(list(framed), axis=1)[:, :-1]


def draw_picture(path: Path, runs: list[Run], rows: list[tuple[str, Tensor]]) -> None:
    """Loss curves above, labelled rows of images [n, 3, h, w] below."""
    figure = Figure(figsize=(9, 3.6 + 1.15 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(1 + len(rows), 1, height_ratios=[3.4] + [1.15] * len(rows))
    axis = figure.add_subplot(grid[0])
    for run, style in zip(runs, ("-", "--"), strict=True):
        (line,) = axis.plot(_smooth(run.losses), style, label=run.name, linewidth=1.8)
        axis.plot(run.losses, color=line.get_color(), alpha=0.15, linewidth=0.7)
    axis.set(xlabel="step", ylabel="flow-matching loss", title=f"LoRA for the held-out photograph '{HELD_OUT}'")
    axis.legend()
    axis.grid(alpha=0.3)
    for i, (label, images) in enumerate(rows):
        axis = figure.add_subplot(grid[1 + i])
        axis.imshow(_strip(images), interpolation="nearest")
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=130)


def write_notes(path: Path, files: dict[str, str]) -> None:
    """A page that says what the files are and where the photographs come from."""
    lines = ["# What the demo left here", ""]
    lines += [f"- `{name}`: {meaning}" for name, meaning in files.items()]
    lines += ["", "The training images are photographs from scikit-image (`skimage.data`):", ""]
    lines += [f"- {p.name} (`skimage.data.{p.loader}`): {p.credit}" for p in PHOTOGRAPHS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
