"""Flow matching on scikit-learn's 8x8 digits: x_t = (1 - t) x + t noise, the model predicts noise - x."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS, CLASSES, FREQUENCIES = 64, 10, 16
VALIDATION = 297


def load() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation digits: images float32 [n, 64] in -1 .. 1, labels int64 [n]. One fixed split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.data).float() / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:VALIDATION], order[VALIDATION:]
    return (images[rest], labels[rest]), (images[held_out], labels[held_out])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, width]
        return x + self.down(F.silu(self.up(self.norm(x))))


class VelocityModel(nn.Module):
    """A residual perceptron over pixels, time and class."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, width)
        self.pixels, self.time = nn.Linear(PIXELS, width), nn.Linear(2 * FREQUENCIES, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, PIXELS)
        nn.init.normal_(self.embed.weight, std=0.02)
        for block in self.blocks:
            # the residual stream keeps its variance over depth
            nn.init.normal_(block.down.weight, std=0.5 / math.sqrt(2 * width * layers))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:  # [batch, 64], [batch], [batch] -> [batch, 64]
        phase = t[:, None] * torch.pi * 2 ** torch.linspace(-1, 5, FREQUENCIES)
        h = self.pixels(x) + self.time(torch.cat([phase.sin(), phase.cos()], 1)) + self.embed(labels)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def noised(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """What `loss` takes: images and labels with the noise and the times, uniform in 0 .. 1, that are drawn for them."""
    return images, labels, torch.randn(images.shape, generator=generator), torch.rand(len(images), generator=generator)


def loss(model: nn.Module, images: Tensor, labels: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the velocity."""
    return F.mse_loss(model(torch.lerp(images, noise, t[:, None]), t, labels), noise - images)
