"""Flow matching as in diffusers' FLUX scripts.

x_sigma = (1 - sigma) · image + sigma · noise;   target = noise - image;   loss = mean((prediction - target)²)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from .latents import images_to_tokens
from .model import Prompts, predict_velocity

# Mean of the logit of sigma: above 0, because the layout of an image is settled where there is much noise.
LOGIT_MEAN = 0.5


def draw_noise(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise for a batch of images, and its level.

    Args:
        images: [batch, 3, size, size].
        generator: CPU generator: CPU and GPU runs of one seed see the same noise.

    Returns:
        noise, like the packed images [batch, tokens, channels]; sigma [batch], logit-normal in 0 .. 1. Both on the CPU.
    """
    sigma = compute_density_for_timestep_sampling("logit_normal", len(images), LOGIT_MEAN, 1.0, generator=generator)
    return torch.randn(images_to_tokens(images).shape, generator=generator), sigma


def flow_matching_loss(
    transformer: FluxTransformer2DModel, images: Tensor, labels: Tensor, noise: Tensor, sigma: Tensor, prompts: Prompts
) -> Tensor:
    """Loss of a batch, a 0-dimensional tensor on the transformer's device. Arguments are moved there."""
    device = transformer.device
    image = images_to_tokens(images.to(device))
    noise, sigma = noise.to(device), sigma.to(device)
    noisy = torch.lerp(image, noise, sigma[:, None, None])
    return F.mse_loss(predict_velocity(transformer, noisy, sigma, prompts, labels.to(device)), noise - image)


@torch.no_grad()
def evaluation_loss(transformer: FluxTransformer2DModel, images: Tensor, label: int, prompts: Prompts, draws: int = 8) -> float:
    """Loss over images [n, 3, size, size] of one class, each with `draws` fixed draws of noise: the same numbers for every model."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((len(images),), label)
    losses = [flow_matching_loss(transformer, images, labels, *draw_noise(images, generator), prompts).item() for _ in range(draws)]
    return sum(losses) / draws
