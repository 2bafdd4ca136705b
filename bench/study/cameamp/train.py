"""The base model, trained once and kept in a folder, and one LoRA run."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from coat_train.comparison import Settings, train_base
from coat_train.data import ImageClasses
from coat_train.flow_matching import evaluation_loss
from coat_train.measure import state_bytes_per_parameter
from coat_train.model import Prompts, add_lora
from coat_train.training import Run, train
from diffusers import FluxTransformer2DModel

from ...environment import ROOT
from .entrants import build

#: Of the base model, the crops and the prompts, which all runs share.
BASE_SEED = 0
CACHE = ROOT / "build" / "study"


@dataclass(frozen=True)
class Recipe:
    """What all runs share; the learning rate follows `coat_train.training.warmup_cosine`."""

    base_steps: int = 600
    base_batch_size: int = 16
    steps: int = 160
    batch_size: int = 8


def case(recipe: Recipe, name: str, lr: float, seed: int) -> dict:
    """What one run is asked for, as plain values; decides whether a recorded row is the one."""
    return {"optimizer": name, "lr": lr, "seed": seed, "recipe": asdict(recipe)}


@cache
def _classes() -> tuple[ImageClasses, Prompts]:
    classes = ImageClasses.load(BASE_SEED)
    return classes, Prompts.random(len(classes.names), BASE_SEED, torch.device("cpu"))


def base_folder(recipe: Recipe) -> Path:
    """Where the base model lies once it is trained."""
    return CACHE / f"tiny_flux_{recipe.base_steps}_{recipe.base_batch_size}"


def prepare(recipe: Recipe) -> Path:
    """Train the base model unless its folder exists."""
    path = base_folder(recipe)
    if path.exists():
        return path
    settings = Settings(path.parent, seed=BASE_SEED, base_steps=recipe.base_steps, batch_size=recipe.base_batch_size)
    base = train_base(settings, *_classes(), on_step=lambda losses: None)
    # renamed when it is whole, so that a stop in the middle of writing leaves nothing to be mistaken for it
    part = path.with_suffix(".part")
    base.transformer.save_pretrained(part)
    part.replace(path)
    return path


@cache
def _base(path: Path) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(path)


def run(asked: dict) -> dict:
    """Train one LoRA; adapter, batches and noise depend on the seed alone.

    Returns:
        The evaluation loss on crops of the held-out class without and with the adapter, training losses, times and state bytes.
    """
    recipe, seed = Recipe(**asked["recipe"]), asked["seed"]
    classes, prompts = _classes()
    crops, label = classes.evaluation[classes.held_out], classes.held_out
    base = _base(base_folder(recipe))
    transformer = copy.deepcopy(base)
    parameters = add_lora(transformer, seed)
    optimizer = build(asked["optimizer"], parameters, asked["lr"], recipe.steps)
    trained = Run(asked["optimizer"], transformer, parameters, optimizer)
    early: list[float] = []

    def on_step(losses: list[float]) -> None:
        # in the first half of CameAMP's warm-up, which is the run's first quarter
        if len(trained.losses) == max(1, recipe.steps // 8):
            early.append(state_bytes_per_parameter(optimizer))

    train([trained], classes, [label], prompts, steps=recipe.steps, batch_size=recipe.batch_size, seed=seed + 1, on_step=on_step)
    return {
        "final_loss": evaluation_loss(transformer, crops, label, prompts),
        "base_loss": evaluation_loss(base, crops, label, prompts),
        "losses": [round(loss, 5) for loss in trained.losses],
        "parameters": sum(p.numel() for p in parameters),
        "state_bytes_per_parameter": state_bytes_per_parameter(optimizer),
        "state_bytes_per_parameter_early": early[0],
        "optimizer_seconds": sum(trained.optimizer_ms) / 1e3,
        "seconds": sum(trained.step_ms) / 1e3,
    }
