"""One run of the study."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .data import batch, validation_batches
from .model import ByteLanguageModel, loss
from .optimizers import OPTIMIZERS, Shadow


@dataclass(frozen=True)
class Recipe:
    """What all runs share. `lr` is the peak of a linear warm-up and a cosine down to a tenth."""

    steps: int = 400
    batch_size: int = 8
    length: int = 128
    width: int = 96
    layers: int = 3
    lr: float = 2e-3
    warmup: int = 40
    weight_decay: float = 0.1
    eps: float = 1e-8
    clip: float = 1.0
    evaluations: int = 8
    error_every: int = 10
    validation: int = 16

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * done))


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    return sum(loss(model, *pair).item() for pair in batches) / len(batches)


def run(recipe: Recipe, optimizer_name: str, seed: int, beta2: float, training: Tensor, validation: Tensor) -> dict:
    """Train once; weights and batches depend on the seed alone.

    Returns:
        A row: losses in nats a byte, the validation curve as [step, loss], the update error as [step, error].
    """
    torch.manual_seed(seed)
    model = ByteLanguageModel(recipe.width, recipe.layers, length=recipe.length)
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    held_out = validation_batches(validation, recipe.validation, recipe.batch_size, recipe.length)
    settings = {"lr": recipe.lr, "betas": (0.9, beta2), "eps": recipe.eps, "weight_decay": recipe.weight_decay}
    optimizer = OPTIMIZERS[optimizer_name](params, **settings)
    shadow = Shadow(params, settings["betas"], recipe.eps)
    curve, errors, training_losses, optimizer_seconds = [], [], [], 0.0
    evaluate_at = {round(recipe.steps * (i + 1) / recipe.evaluations) for i in range(recipe.evaluations)}
    for step in range(recipe.steps):
        lr = recipe.lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        value = loss(model, *batch(training, recipe.batch_size, recipe.length, generator))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, recipe.clip)
        shadow.observe()
        measured = (step + 1) % recipe.error_every == 0
        before = [p.detach().clone() for p in params] if measured else []
        begin = time.perf_counter()
        optimizer.step()
        optimizer_seconds += time.perf_counter() - begin
        if measured:
            errors.append([step + 1, shadow.update_error(before, lr, recipe.weight_decay)])
        training_losses.append(value.item())
        if step + 1 in evaluate_at:
            curve.append([step + 1, evaluate(model, held_out)])
    tail = training_losses[-max(1, recipe.steps // 10) :]
    return {
        "optimizer": optimizer_name,
        "seed": seed,
        "beta2": beta2,
        "parameters": sum(p.numel() for p in params),
        "final_loss": curve[-1][1],
        "best_loss": min(point[1] for point in curve),
        "first_training_loss": training_losses[0],
        "final_training_loss": sum(tail) / len(tail),
        "curve": curve,
        "update_error": errors,
        "optimizer_seconds": optimizer_seconds,
        "recipe": asdict(recipe),
    }
