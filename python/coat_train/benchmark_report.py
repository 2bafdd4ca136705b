"""What `benchmark_coat.py` shows and writes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .benchmark import PARTS, BenchmarkResult, BenchmarkSettings, run_benchmark

_MB = 1 << 20
_TITLES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "saved_activations": "saved activations",
    "saved_beside": "saved besides",
    "total": "all of these",
}


def result_table(result: BenchmarkResult) -> Table:
    """Both sides and COAT's ratio, one line a number."""
    ratios = result.ratios()
    settings, standard, coat = result.settings, result.standard, result.coat
    saves = [name for name, used in (("optimizer", settings.use_fp8_optimizer), ("activations", settings.use_fp8_activation)) if used]
    table = Table(
        title=f"{settings.num_layers} blocks of {settings.hidden_size}, {settings.batch_size} x {settings.tokens} tokens, "
        f"{settings.precision}, {settings.device}; FP8: {', '.join(saves)}"
    )
    for heading in ("", "standard", "COAT", "COAT / standard"):
        table.add_column(heading, justify="left" if not heading else "right")

    def row(title: str, one: str, other: str, ratio: str) -> None:
        table.add_row(title, one, other, f"{ratios[ratio]:.3f}" if ratio in ratios else "")

    for name in (*PARTS, "total"):
        one, other = (side.total if name == "total" else side.memory[name] for side in (standard, coat))
        row(f"{_TITLES[name]}, MiB", f"{one / _MB:.2f}", f"{other / _MB:.2f}", name)
    row("step, median ms", *(f"{statistics.median(side.step_ms):.1f}" for side in (standard, coat)), "step_time")
    memory = settings.memory_bytes / (1 << 30)
    how = "by trial" if settings.device == "cuda" else "by bytes"
    row(f"largest batch in {memory:g} GB, {how}", f"{standard.largest_batch}", f"{coat.largest_batch}", "largest_batch")
    row(f"loss after {len(coat.losses)} steps", f"{standard.losses[-1]:.4f}", f"{coat.losses[-1]:.4f}", "final_loss")
    return table


def check_output(path: Path) -> None:
    """Make the folder of the results' file and see that it can be written, before minutes are spent.

    Raises:
        OSError: it cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; --output names the file to write")
    beside = path.with_name(path.name + ".part")
    beside.write_text("")
    beside.unlink()


def write_results(result: BenchmarkResult, path: Path) -> None:
    """The JSON file, written aside and renamed, so that it is whole or not there."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def benchmark(settings: BenchmarkSettings, output: Path, console: Console) -> BenchmarkResult:
    """Run, show the table and write the file.

    Raises:
        OSError: the file cannot be written.
    """
    check_output(output)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("standard and COAT", total=settings.num_steps, loss="")

        def on_step(standard: float, coat: float) -> None:
            progress.update(task, advance=1, loss=f"loss {standard:.4f} / {coat:.4f}")

        result = run_benchmark(settings, on_step)
    write_results(result, output)
    console.print(result_table(result))
    for note in result.notes:
        console.print(note, soft_wrap=True, highlight=False)
    console.print(f"[bold]{output}[/bold] has these numbers and the loss of every step.", soft_wrap=True, highlight=False)
    return result
