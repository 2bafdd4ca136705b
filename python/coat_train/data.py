"""Image classes made of the photographs that ship inside the scikit-image wheel: one photograph, one class.

Only files of the wheel itself are used, so nothing is downloaded. All are CC0, in the public domain or without known copyright
restrictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data as skimage_data
from torch import Tensor

IMAGE_SIZE = 40


@dataclass(frozen=True)
class Photograph:
    """One image class.

    Args:
        name: of the class.
        loader: function of `skimage.data` that returns the photograph.
        credit: who took it, and on what terms (from scikit-image's documentation).
    """

    name: str
    loader: str
    credit: str


PHOTOGRAPHS = (
    Photograph("astronaut", "astronaut", "NASA, public domain"),
    Photograph("camera", "camera", "Lav Varshney, CC0"),
    Photograph("coffee", "coffee", "Pikolo Espresso Bar, photograph by Rachel Michetti, CC0"),
    Photograph("coins", "coins", "Brooklyn Museum Collection, no known copyright restrictions"),
    Photograph("deep field", "hubble_deep_field", "NASA, public domain"),
    Photograph("tissue", "immunohistochemistry", "Center for Microscopy And Molecular Imaging, no known copyright restrictions"),
    Photograph("retina", "retina", "Wikimedia Commons, CC0"),
    Photograph("rocket", "rocket", "SpaceX, public domain"),
    Photograph("cat", "chelsea", "Stefan van der Walt, CC0"),
)
HELD_OUT = "cat"


def load_photograph(photograph: Photograph) -> Tensor:
    """The photograph as float32 [3, height, width] in -1 .. 1; greyscale ones get three equal channels."""
    pixels = getattr(skimage_data, photograph.loader)()
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1.0


def random_crops(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Square crops around the middle of a photograph, randomly moved, scaled and mirrored.

    The side is 0.85 to 1 of the shorter side and the centre moves by up to 6 % of it: enough variety that a class is a
    distribution, little enough that a small transformer learns its layout in a few hundred steps.

    Args:
        image: float32 [3, height, width].
        count: number of crops.
        generator: CPU generator; the same one gives the same crops.

    Returns:
        float32 [count, 3, IMAGE_SIZE, IMAGE_SIZE] in -1 .. 1.
    """
    height, width = image.shape[1:]
    shorter = min(height, width)
    crops = []
    for _ in range(count):
        zoom, down, right, mirror = torch.rand(4, generator=generator).tolist()
        side = round(shorter * (0.85 + 0.15 * zoom))
        top = round(min(max((height - side) / 2 + (down - 0.5) * 0.12 * shorter, 0), height - side))
        left = round(min(max((width - side) / 2 + (right - 0.5) * 0.12 * shorter, 0), width - side))
        crop = image[None, :, top : top + side, left : left + side]
        crop = F.interpolate(crop, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        crops.append(crop.flip(3) if mirror < 0.5 else crop)
    return torch.cat(crops).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class ImageClasses:
    """Crops of every class, those that are trained on and those that are only looked at.

    Attributes:
        names: of the classes; a label is an index into it.
        train: float32 [n_classes, n_train, 3, IMAGE_SIZE, IMAGE_SIZE] in -1 .. 1.
        evaluation: float32 [n_classes, n_evaluation, 3, IMAGE_SIZE, IMAGE_SIZE], crops that `train` does not hold.
    """

    names: tuple[str, ...]
    train: Tensor
    evaluation: Tensor

    @classmethod
    def load(cls, seed: int, n_train: int = 128, n_evaluation: int = 32) -> ImageClasses:
        """Cut the crops of all `PHOTOGRAPHS`."""
        generator = torch.Generator().manual_seed(seed)
        images = [load_photograph(photograph) for photograph in PHOTOGRAPHS]
        crops = torch.stack([random_crops(image, n_train + n_evaluation, generator) for image in images])
        return cls(tuple(p.name for p in PHOTOGRAPHS), crops[:, :n_train], crops[:, n_train:])

    @property
    def held_out(self) -> int:
        """Label of the class that base training never sees."""
        return self.names.index(HELD_OUT)

    @property
    def base(self) -> list[int]:
        """Labels of all other classes."""
        return [label for label in range(len(self.names)) if label != self.held_out]

    def draw(self, labels: list[int], batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch of training crops of the given classes: images [batch, 3, size, size], labels int64 [batch]."""
        label = torch.tensor(labels)[torch.randint(len(labels), (batch_size,), generator=generator)]
        crop = torch.randint(self.train.shape[1], (batch_size,), generator=generator)
        return self.train[label, crop], label
