"""Images to packed FLUX latents and back, by a fixed cosine transform that stands in for the autoencoder.

    X = D · image · Dᵀ      D: the orthonormal DCT-II, its lowest LATENT_SIZE frequencies
    latent(u, v) = X(u, v) / weight(u, v),   weight = sqrt(spectrum(r)),   r = sqrt(u² + v²)

One token then holds a band of frequencies of the whole image. Cut into pixel patches instead, the same model trained for as long draws
patches that do not fit together: where a patch lies is the last thing that it learns. The weight is the square root of the magnitude of a
natural image's spectrum (1/r; the constants are fitted to the photographs of `data.py`): it brings the latents near the noise's unit
variance, yet leaves a low frequency, which settles the colours, more weight in the loss than a high one.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor

from .data import IMAGE_SIZE

LATENT_SIZE = 20  # frequencies kept of each axis
FOLD = 2  # frequencies of one axis in a latent; FLUX packs 2 x 2 latents into one token
TOKEN_CHANNELS = 3 * (2 * FOLD) ** 2
GRID = LATENT_SIZE // (2 * FOLD)  # tokens of one axis


@cache
def _transform(device: torch.device) -> tuple[Tensor, Tensor]:
    """D [LATENT_SIZE, IMAGE_SIZE] and weight [LATENT_SIZE, LATENT_SIZE]."""
    frequency = torch.arange(LATENT_SIZE, dtype=torch.float64)
    position = torch.arange(IMAGE_SIZE) + 0.5
    basis = math.sqrt(2 / IMAGE_SIZE) * torch.cos(math.pi / IMAGE_SIZE * frequency[:, None] * position)
    basis[0] /= math.sqrt(2)
    spectrum = 0.1875 * IMAGE_SIZE / (torch.hypot(frequency[:, None], frequency) + 0.45)
    return basis.float().to(device), spectrum.sqrt().float().to(device)


def images_to_tokens(images: Tensor) -> Tensor:
    """Images [batch, 3, IMAGE_SIZE, IMAGE_SIZE] as packed latents [batch, GRID², TOKEN_CHANNELS]."""
    basis, weight = _transform(images.device)
    latents = F.pixel_unshuffle(basis @ images @ basis.T / weight, FOLD)
    return FluxPipeline._pack_latents(latents, *latents.shape)


def tokens_to_images(tokens: Tensor) -> Tensor:
    """Images of packed latents; what `images_to_tokens` dropped, the highest frequencies, stays away."""
    basis, weight = _transform(tokens.device)
    side = LATENT_SIZE // FOLD
    latents = FluxPipeline._unpack_latents(tokens, side, side, vae_scale_factor=1)
    return basis.T @ (F.pixel_shuffle(latents, FOLD) * weight) @ basis
