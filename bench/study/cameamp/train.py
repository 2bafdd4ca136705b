"""One LoRA run."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

from coat_train.flow_matching import evaluation_loss
from coat_train.measure import state_bytes_per_parameter
from coat_train.model import add_lora
from coat_train.training import Run, train

from .. import flux
from .entrants import build


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


def run(asked: dict) -> dict:
    """Train one LoRA; adapter, batches and noise depend on the seed alone.

    Returns:
        The evaluation loss on crops of the held-out class without and with the adapter, training losses, times and state bytes.
    """
    recipe, seed = Recipe(**asked["recipe"]), asked["seed"]
    classes, prompts = flux.classes_and_prompts()
    crops, label = classes.evaluation[classes.held_out], classes.held_out
    base = flux.base(flux.base_folder(recipe.base_steps, recipe.base_batch_size))
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
