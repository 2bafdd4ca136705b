"""Training loops: the base model, and two adapters side by side on the same batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .data import ImageClasses
from .flow_matching import draw_noise, flow_matching_loss
from .model import Prompts

MAX_GRAD_NORM = 1.0

OnStep = Callable[[list[float]], None]


def warmup_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Linear warm-up over a twentieth of the steps, then a cosine down to 2 % of the learning rate."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.51 + 0.49 * math.cos(math.pi * step / steps))

    return LambdaLR(optimizer, factor)


@dataclass
class Run:
    """One model in training, and what was seen of it.

    Attributes:
        losses: one a step.
        step_ms: duration of each step: forward, backward, clipping and optimizer.
        optimizer_ms: duration of each `optimizer.step()`.
    """

    name: str
    transformer: FluxTransformer2DModel
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor, noise: Tensor, sigma: Tensor, prompts: Prompts) -> None:
        """One training step, timed to the end of its work on the device."""
        start = self._now()
        loss = flow_matching_loss(self.transformer, images, labels, noise, sigma, prompts)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        before = self._now()
        self.optimizer.step()
        end = self._now()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.step_ms.append(1e3 * (end - start))
        self.optimizer_ms.append(1e3 * (end - before))

    def _now(self) -> float:
        if self.transformer.device.type == "cuda":
            torch.cuda.synchronize(self.transformer.device)
        return time.perf_counter()


def train(
    runs: list[Run],
    classes: ImageClasses,
    labels: list[int],
    prompts: Prompts,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    on_step: OnStep,
) -> None:
    """Train all runs on the same batches, noise and schedule, in turn within each step.

    Taking turns, and starting with another run each time, gives all of them the same share of whatever else the machine does: their times
    compare.

    Args:
        labels: classes to draw from.
        on_step: called after each step with the last loss of each run.
    """
    generator = torch.Generator().manual_seed(seed)
    schedules = [warmup_cosine(run.optimizer, steps) for run in runs]
    for step in range(steps):
        images, label = classes.draw(labels, batch_size, generator)
        noise, sigma = draw_noise(images, generator)
        first = step % len(runs)
        for run in runs[first:] + runs[:first]:
            run.step(images, label, noise, sigma, prompts)
        for schedule in schedules:
            schedule.step()
        on_step([run.losses[-1] for run in runs])
