"""The tiny FLUX that LoRA studies start from: trained once and kept in a folder, with its photographs and prompts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from coat_train.comparison import Settings, train_base
from coat_train.data import ImageClasses
from coat_train.model import Prompts
from diffusers import FluxTransformer2DModel

from ..environment import ROOT

#: Of the base model, the crops and the prompts, which all runs share.
BASE_SEED = 0
CACHE = ROOT / "build" / "study"


@cache
def classes_and_prompts() -> tuple[ImageClasses, Prompts]:
    classes = ImageClasses.load(BASE_SEED)
    return classes, Prompts.random(len(classes.names), BASE_SEED, torch.device("cpu"))


def base_folder(steps: int, batch_size: int) -> Path:
    """Where the base model lies once it is trained."""
    return CACHE / f"tiny_flux_{steps}_{batch_size}"


def prepare(steps: int, batch_size: int) -> Path:
    """Train the base model on all classes but the held-out one, unless its folder exists."""
    path = base_folder(steps, batch_size)
    if path.exists():
        return path
    settings = Settings(path.parent, seed=BASE_SEED, base_steps=steps, batch_size=batch_size)
    base = train_base(settings, *classes_and_prompts(), on_step=lambda losses: None)
    # renamed when it is whole, so that a stop in the middle of writing leaves nothing to be mistaken for it
    part = path.with_suffix(".part")
    base.transformer.save_pretrained(part)
    part.replace(path)
    return path


@cache
def base(path: Path) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(path)
