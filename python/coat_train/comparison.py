"""What `coat demo` runs: a small FLUX is trained on photographs, then a LoRA for one it has not seen, with two optimizers."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from coat_kernels.optim import FP8AdamW

from .data import HELD_OUT, ImageClasses
from .flow_matching import draw_noise, evaluation_loss
from .latents import images_to_tokens
from .model import Prompts, add_lora, build_transformer, load_lora, predict_velocity, sample_images, save_lora
from .report import Result, draw_picture, result_table, write_notes
from .training import OnStep, Run, train

BASE_LR = 3e-3
LORA_LR = 1.2e-2
WEIGHT_DECAY = 0.01


class DemoError(RuntimeError):
    """The demo found that something does not hold which it exists to show."""


@dataclass(frozen=True)
class Settings:
    """What one run of the demo does.

    Args:
        output: folder for everything it writes.
        device: "cpu" or "cuda".
        seed: of weights, crops, batches, noise and samples.
        base_steps, lora_steps: training steps of each phase.
        samples: images drawn of each model.
    """

    output: Path
    device: str = "cpu"
    seed: int = 0
    base_steps: int = 1600
    lora_steps: int = 450
    batch_size: int = 16
    samples: int = 8

    @classmethod
    def quick(cls, output: Path, device: str = "cpu", seed: int = 0) -> Settings:
        """A few steps of everything: shows that it runs, learns next to nothing."""
        return cls(output, device, seed, base_steps=8, lora_steps=6, batch_size=4, samples=2)


@dataclass(frozen=True)
class Outcome:
    """What `run_demo` returns.

    Attributes:
        base: the run that trained the base model.
        runs: the two LoRA runs, AdamW first.
        results: their lines of the table.
        without_lora: evaluation loss of the base model on the held-out class.
        reload_difference: largest difference between the output of a trained LoRA and of the same LoRA read back from its file.
    """

    base: Run
    runs: list[Run]
    results: list[Result]
    without_lora: float
    reload_difference: float


def train_base(settings: Settings, classes: ImageClasses, prompts: Prompts, on_step: OnStep) -> Run:
    """Train the transformer from random weights on all classes but the held-out one."""
    transformer = build_transformer(settings.seed).to(settings.device)
    parameters = list(transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=BASE_LR, weight_decay=WEIGHT_DECAY, fused=True)
    run = Run("base", transformer, parameters, optimizer)
    steps, batch = settings.base_steps, settings.batch_size
    train([run], classes, classes.base, prompts, steps=steps, batch_size=batch, seed=settings.seed, on_step=on_step)
    return run


def train_loras(settings: Settings, base: FluxTransformer2DModel, classes: ImageClasses, prompts: Prompts, on_step: OnStep) -> list[Run]:
    """Train the same LoRA for the held-out class with `torch.optim.AdamW` and with `FP8AdamW`."""

    def start(name: str, optimizer: Callable[..., torch.optim.Optimizer], **options: object) -> Run:
        transformer = copy.deepcopy(base)
        parameters = add_lora(transformer, settings.seed)
        return Run(name, transformer, parameters, optimizer(parameters, lr=LORA_LR, weight_decay=WEIGHT_DECAY, **options))

    # Every tensor of so small an adapter lies under FP8AdamW's default threshold: quantize all of them.
    runs = [start("torch AdamW (fused)", torch.optim.AdamW, fused=True), start("FP8AdamW", FP8AdamW, min_quant_numel=0)]
    steps, batch = settings.lora_steps, settings.batch_size
    train(runs, classes, [classes.held_out], prompts, steps=steps, batch_size=batch, seed=settings.seed + 1, on_step=on_step)
    return runs


@torch.no_grad()
def reload_difference(transformer: FluxTransformer2DModel, base: Path, lora: Path, images: Tensor, label: int, prompts: Prompts) -> float:
    """Largest difference between the output of `transformer` and of what `base` and `lora` on disk make.

    Raises:
        DemoError: it is not zero, though the weights are the same float32 numbers.
    """
    noise, sigma = (x.to(transformer.device) for x in draw_noise(images, torch.Generator().manual_seed(0)))
    labels = torch.full((len(images),), label, device=transformer.device)
    noisy = torch.lerp(images_to_tokens(images).to(transformer.device), noise, sigma[:, None, None])
    restored = load_lora(base, lora, transformer.device)
    outputs = [predict_velocity(model, noisy, sigma, prompts, labels) for model in (transformer, restored)]
    difference = (outputs[0] - outputs[1]).abs().max().item()
    if not difference == 0.0:
        raise DemoError(
            f"the LoRA in {lora} was read back by FluxPipeline.load_lora_weights, but its output differs by up to {difference:.3g} where "
            "0 is needed: this diffusers and peft do not read what they wrote; the versions the project is tested with are in requirements/"
        )
    return difference


@contextmanager
def progress_phase(progress: Progress, name: str, steps: int) -> Iterator[OnStep]:
    """A line of the progress bar; yields what to call after each step."""
    task = progress.add_task(name, total=steps, loss="")

    def on_step(losses: list[float]) -> None:
        progress.update(task, advance=1, loss="loss " + " / ".join(f"{loss:.3f}" for loss in losses))

    yield on_step


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TextColumn("left"))
    return Progress(*columns, TimeRemainingColumn(), console=console)


def run_demo(settings: Settings, console: Console) -> Outcome:
    """Train, compare, save, check and draw; everything lands in `settings.output`."""
    started = time.perf_counter()
    settings.output.mkdir(parents=True, exist_ok=True)
    device = torch.device(settings.device)
    classes = ImageClasses.load(settings.seed)
    prompts = Prompts.random(len(classes.names), settings.seed, device)
    held_out, held_out_crops = classes.held_out, classes.evaluation[classes.held_out]
    base_folder = settings.output / "transformer"
    lora_folders = [settings.output / "lora-adamw", settings.output / "lora-fp8adamw"]

    others = ", ".join(classes.names[label] for label in classes.base)
    console.print(
        f"A small FLUX learns {len(classes.base)} photographs of scikit-image ({others}) from random weights; then a LoRA learns one "
        f"more, the {HELD_OUT}, twice at once: with torch's AdamW and with FP8AdamW."
    )
    with _progress(console) as progress:
        with progress_phase(progress, "1/3 base model", settings.base_steps) as on_step:
            base = train_base(settings, classes, prompts, on_step)
        base.transformer.save_pretrained(base_folder)
        without_lora = evaluation_loss(base.transformer, held_out_crops, held_out, prompts)
        with progress_phase(progress, "2/3 both LoRAs", settings.lora_steps) as on_step:
            runs = train_loras(settings, base.transformer, classes, prompts, on_step)
        with progress_phase(progress, "3/3 samples", 3) as on_step:
            rows = [("training images", classes.train[held_out, : settings.samples])]
            for name, model in [("no LoRA", base.transformer)] + [(run.name, run.transformer) for run in runs]:
                rows.append((name, sample_images(model, prompts, held_out, settings.samples, settings.seed)))
                on_step([])
            results = [Result.of(run, evaluation_loss(run.transformer, held_out_crops, held_out, prompts)) for run in runs]

    difference = 0.0
    for run, folder in zip(runs, lora_folders, strict=True):
        save_lora(run.transformer, folder)
        difference = max(difference, reload_difference(run.transformer, base_folder, folder, held_out_crops[:8], held_out, prompts))
    outcome = Outcome(base, runs, results, without_lora, difference)
    write_outputs(settings, outcome, rows)
    console.print(result_table(results, without_lora))
    lines = (
        f"LoRA files read back by FluxPipeline.load_lora_weights: largest output difference {difference:g}",
        f"[bold]{settings.output / 'demo.png'}[/bold]: loss curves and sampled images; README.md beside it says what else is there",
        f"Done in {time.perf_counter() - started:.0f} s on {_device_name(device)}.",
    )
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
    return outcome


def write_outputs(settings: Settings, outcome: Outcome, rows: list[tuple[str, Tensor]]) -> None:
    """The picture, the numbers and the notes."""
    draw_picture(settings.output / "demo.png", outcome.runs, rows)
    numbers = {
        "results": [asdict(result) for result in outcome.results],
        "without_lora": outcome.without_lora,
        "losses": {run.name: run.losses for run in [outcome.base, *outcome.runs]},
    }
    (settings.output / "results.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    files = {
        "demo.png": "loss curves, and sampled images beside training images",
        "results.json": "the table's numbers and all losses",
        "transformer/": "the base model, for `FluxTransformer2DModel.from_pretrained`",
        "lora-adamw/": "the LoRA trained with torch's AdamW, for `FluxPipeline.load_lora_weights`",
        "lora-fp8adamw/": "the same, trained with FP8AdamW",
    }
    write_notes(settings.output / "README.md", files)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU, threads: {torch.get_num_threads()}"
