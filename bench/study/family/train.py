"""One run of the study."""

from __future__ import annotations

import math
import time
from dataclasses import asdict

import torch
from torch.optim import Optimizer

from .entrants import FAMILIES
from .works import WORKS, Work


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


def run(asked: dict) -> dict:
    """Train once; weights and batches depend on the seed alone.

    Returns:
        Validation losses as [step, loss], training losses, seconds in the optimizer, bytes of its states a parameter.
    """
    work = WORKS[asked["work"]](**asked["recipe"])
    family, seed = FAMILIES[asked["optimizer"]], asked["seed"]
    torch.manual_seed(seed)
    network = work.build()
    parameters = list(network.parameters())
    decay = work.weight_decay * family.decay_factor
    optimizers = family.build(network, work.outer, asked["lr"], decay, work.steps, asked["form"])
    training, validation = work.load()
    held_out = work.validation_batches(validation)
    generator = torch.Generator().manual_seed(seed)
    warmup = max(1, round(work.steps * work.warmup_share))
    evaluate_at = {round(work.steps * (i + 1) / work.evaluations) for i in range(work.evaluations)}
    curve, losses, seconds = [], [], 0.0
    for step in range(work.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = asked["lr"] * schedule(step, work.steps, warmup)
        loss = work.loss(network, work.batch(training, generator))
        network.zero_grad(set_to_none=True)
        loss.backward()
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
