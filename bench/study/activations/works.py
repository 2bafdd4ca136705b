"""The family study's two works, and a LoRA of the tiny FLUX for the photograph that its base model has not seen."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from coat_train.flow_matching import draw_noise, flow_matching_loss
from coat_train.model import add_lora
from torch import Tensor, nn

from .. import flux
from ..family.works import Batch, Digits, Language, Work


@dataclass(frozen=True)
class FluxLoRA(Work):
    steps: int = 160
    batch_size: int = 8
    weight_decay: float = 0.01
    warmup_share: float = 0.05
    evaluations: int = 2
    validation: int = 4
    base_steps: int = 600
    base_batch_size: int = 16

    name: ClassVar[str] = "flux"

    def load(self) -> tuple[Tensor, Tensor]:
        """Crops of the held-out photograph [n, 3, size, size] that are trained on, and others that are not."""
        classes, _ = flux.classes_and_prompts()
        return classes.train[classes.held_out], classes.evaluation[classes.held_out]

    def build(self) -> nn.Module:
        transformer = copy.deepcopy(flux.base(flux.base_folder(self.base_steps, self.base_batch_size)))
        add_lora(transformer, int(torch.randint(2**31, ())))
        return transformer

    def batch(self, training, generator: torch.Generator) -> Batch:
        return self._noised(training[torch.randint(len(training), (self.batch_size,), generator=generator)], generator)

    def validation_batches(self, validation) -> list[Batch]:
        generator = torch.Generator().manual_seed(1234)
        return [self._noised(validation, generator) for _ in range(self.validation)]

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        images, noise, sigma = batch
        classes, prompts = flux.classes_and_prompts()
        return flow_matching_loss(network, images, torch.full((len(images),), classes.held_out), noise, sigma, prompts)

    @staticmethod
    def _noised(images: Tensor, generator: torch.Generator) -> Batch:
        return images, *draw_noise(images, generator)


WORKS: dict[str, type[Work]] = {work.name: work for work in (FluxLoRA, Digits, Language)}
