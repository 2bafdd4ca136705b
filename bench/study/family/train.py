"""One run of the study."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import nn
from torch.optim import Optimizer

from .entrants import FAMILIES
from .works import WORKS, Batch, Work


def case(work: Work, family: str, form: str, lr: float, seed: int) -> dict:
    """What one run is asked for, as plain values; decides whether a recorded row is the one."""
    return {"work": work.name, "optimizer": family, "form": form, "lr": lr, "seed": seed, "recipe": asdict(work)}


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at step 0, 1, ..."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.51 + 0.49 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def state_bytes(optimizers: list[Optimizer]) -> int:
    """Of all tensors that the optimizers keep, step counts apart."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    tensors = [value for state in states for name, value in state.items() if isinstance(value, torch.Tensor) and name != "step"]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fit(
    work: Work,
    network: nn.Module,
    optimizers: list[Optimizer],
    lr: float,
    seed: int,
    observe: Callable[[int, Batch], None] = lambda step, batch: None,
) -> dict:
    """Train a network on the batches that follow from the seed.

    Args:
        lr: the peak.
        observe: called with the step's number and batch once the gradients are there, before they are clipped.

    Returns:
        Validation losses as [step, loss], training losses, seconds in the optimizer, bytes of its states a parameter.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    training, validation = work.load()
    held_out = work.validation_batches(validation)
    generator = torch.Generator().manual_seed(seed)
    warmup = max(1, round(work.steps * work.warmup_share))
    evaluate_at = {round(work.steps * (i + 1) / work.evaluations) for i in range(work.evaluations)}
    curve, losses, seconds = [], [], 0.0
    for step in range(work.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * schedule(step, work.steps, warmup)
        batch = work.batch(training, generator)
        loss = work.loss(network, batch)
        network.zero_grad(set_to_none=True)
        loss.backward()
        observe(step, batch)
        torch.nn.utils.clip_grad_norm_(parameters, work.clip)
        begin = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        seconds += time.perf_counter() - begin
        losses.append(loss.item())
        if step + 1 in evaluate_at:
            with torch.no_grad():
                curve.append([step + 1, sum(work.loss(network, batch).item() for batch in held_out) / len(held_out)])
    count = sum(p.numel() for p in parameters)
    return {
        "final_loss": curve[-1][1],
        "curve": curve,
        "first_training_loss": losses[0],
        "final_training_loss": sum(losses[-10:]) / len(losses[-10:]),
        "parameters": count,
        "state_bytes_per_parameter": state_bytes(optimizers) / count,
        "optimizer_seconds": seconds,
    }


def run(asked: dict) -> dict:
    """Train once, see `fit`; weights and batches depend on the seed alone."""
    work = WORKS[asked["work"]](**asked["recipe"])
    family = FAMILIES[asked["optimizer"]]
    torch.manual_seed(asked["seed"])
    network = work.build()
    decay = work.weight_decay * family.decay_factor
    optimizers = family.build(network, work.outer, asked["lr"], decay, work.steps, asked["form"])
    return fit(work, network, optimizers, asked["lr"], asked["seed"])
