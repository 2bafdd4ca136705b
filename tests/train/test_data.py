"""The demo's images are real photographs of the scikit-image wheel, and the held-out one stays out."""

from __future__ import annotations

from importlib.metadata import files

import numpy as np
import pytest
import torch
from coat_train.data import HELD_OUT, IMAGE_SIZE, PHOTOGRAPHS, ImageClasses, load_photograph
from skimage import data as skimage_data
from skimage.io import imread


@pytest.fixture(scope="module")
def classes() -> ImageClasses:
    return ImageClasses.load(seed=0, n_train=6, n_evaluation=3)


@pytest.fixture(scope="module")
def wheel_images() -> list[np.ndarray]:
    """All images that the installed scikit-image distribution itself lists."""
    shipped = [path.locate() for path in files("scikit-image") if path.parent.name == "data" and path.suffix in (".png", ".jpg")]
    return [imread(path) for path in shipped]


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda p: p.name)
def test_photograph_is_in_the_wheel(photograph, wheel_images):
    image = load_photograph(photograph)
    pixels = getattr(skimage_data, photograph.loader)()
    assert any(np.array_equal(pixels, shipped) for shipped in wheel_images)
    expected = np.broadcast_to(np.atleast_3d(pixels), (*pixels.shape[:2], 3)) / 127.5 - 1
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-6)
    assert image.max() - image.min() > 1, "a photograph uses at least half of its range"


def test_crops_are_photographic_and_all_different(classes):
    crops = torch.cat([classes.train, classes.evaluation], dim=1)
    assert crops.shape == (len(PHOTOGRAPHS), 9, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert crops.min() >= -1 and crops.max() <= 1
    assert crops.std(dim=(2, 3, 4)).min() > 0.02, "no crop is flat"
    for of_class in crops.flatten(2):
        assert torch.cdist(of_class, of_class).fill_diagonal_(1).min() > 0.1, "no crop twice: evaluation crops are not trained on"


def test_same_seed_same_crops(classes):
    assert torch.equal(ImageClasses.load(seed=0, n_train=6, n_evaluation=3).train, classes.train)
    assert not torch.equal(ImageClasses.load(seed=1, n_train=6, n_evaluation=3).train, classes.train)


def test_held_out_class_is_never_drawn_for_the_base(classes):
    assert classes.names[classes.held_out] == HELD_OUT
    images, labels = classes.draw(classes.base, 500, torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == set(range(len(PHOTOGRAPHS))) - {classes.held_out}
    assert not (images[:, None] == classes.train[classes.held_out]).flatten(2).all(2).any()
