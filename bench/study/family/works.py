"""The two works: what a run trains, on what, and how it is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import data, model
from . import digits

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Work(ABC):
    """One model on one data set. The fields are the recipe: `lr` is the peak of a linear warm-up and a cosine down to a fiftieth."""

    steps: int
    batch_size: int
    weight_decay: float
    warmup_share: float = 0.1
    clip: float = 1.0
    evaluations: int = 4
    validation: int = 8

    #: What it is called, and the parts of the model that are no hidden matrices: Muon leaves them to AdamW.
    name: ClassVar[str]
    outer: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def load(self) -> tuple[object, object]:
        """Training and validation data."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model, from torch's global generator."""

    @abstractmethod
    def batch(self, training: object, generator: torch.Generator) -> Batch:
        """One training batch."""

    @abstractmethod
    def validation_batches(self, validation: object) -> list[Batch]:
        """The same for every run."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Digits(Work):
    steps: int = 800
    batch_size: int = 128
    weight_decay: float = 0.01
    width: int = 128
    layers: int = 3

    name: ClassVar[str] = "digits"
    outer: ClassVar[tuple[str, ...]] = ("embed", "pixels", "time", "head")

    def load(self) -> tuple[object, object]:
        return digits.load()

    def build(self) -> nn.Module:
        return digits.VelocityModel(self.width, self.layers)

    def batch(self, training, generator: torch.Generator) -> Batch:
        images, labels = training
        chosen = torch.randint(len(images), (self.batch_size,), generator=generator)
        return digits.noised(images[chosen], labels[chosen], generator)

    def validation_batches(self, validation) -> list[Batch]:
        generator = torch.Generator().manual_seed(1234)
        return [digits.noised(*validation, generator) for _ in range(self.validation)]

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        return digits.loss(network, *batch)


@dataclass(frozen=True)
class Language(Work):
    steps: int = 500
    batch_size: int = 8
    weight_decay: float = 0.1
    width: int = 64
    layers: int = 2
    length: int = 64
    validation: int = 32

    name: ClassVar[str] = "language"
    outer: ClassVar[tuple[str, ...]] = ("embed", "position", "head")

    def load(self) -> tuple[object, object]:
        return data.split(data.text())

    def build(self) -> nn.Module:
        return model.ByteLanguageModel(self.width, self.layers, length=self.length)

    def batch(self, training, generator: torch.Generator) -> Batch:
        return data.batch(training, self.batch_size, self.length, generator)

    def validation_batches(self, validation) -> list[Batch]:
        return data.validation_batches(validation, self.validation, self.batch_size, self.length)

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        return model.loss(network, *batch)


WORKS: dict[str, type[Work]] = {work.name: work for work in (Digits, Language)}
