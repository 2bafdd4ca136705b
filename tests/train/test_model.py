"""Latents, the flow-matching loss, and what diffusers' pipeline makes of the small FLUX."""

from __future__ import annotations

import pytest
import torch
from coat_train.data import IMAGE_SIZE, ImageClasses
from coat_train.flow_matching import draw_noise, flow_matching_loss
from coat_train.latents import GRID, TOKEN_CHANNELS, images_to_tokens, tokens_to_images
from coat_train.model import Prompts, add_lora, build_transformer, predict_velocity, sample_images
from diffusers import FluxTransformer2DModel


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    return ImageClasses.load(seed=0, n_train=2, n_evaluation=1).train.flatten(0, 1)


def random_last_layer(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Its output is zero before training: give it one that depends on everything."""
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer


def test_tokens_hold_the_low_frequencies(photographs):
    tokens = images_to_tokens(photographs)
    assert tokens.shape == (len(photographs), GRID**2, TOKEN_CHANNELS)
    restored = tokens_to_images(tokens)
    # What the transform drops is a small part of a photograph; what it keeps, it keeps to float32 rounding of sums of 40.
    assert (restored - photographs).pow(2).mean() < 0.05 * photographs.var()
    torch.testing.assert_close(images_to_tokens(restored), tokens, rtol=0, atol=3e-5)


def test_latents_are_near_unit_variance(photographs):
    # The noise they are mixed with has variance 1; a factor of 3 either way would make most noise levels useless.
    assert 1 / 3 < images_to_tokens(photographs).std() < 3


def test_first_token_alone_is_the_layout(photographs):
    tokens = images_to_tokens(photographs)
    tokens[:, 1:] = 0
    error = (tokens_to_images(tokens) - photographs).pow(2).mean() / photographs.pow(2).mean()
    assert error < 0.25


def test_loss_of_a_zero_model_is_the_mean_square_of_the_target(photographs):
    transformer, prompts = build_transformer(0), Prompts.random(3, 0, torch.device("cpu"))
    noise, sigma = draw_noise(photographs, torch.Generator().manual_seed(1))
    assert 0 < sigma.min() and sigma.max() < 1
    labels = torch.zeros(len(photographs), dtype=torch.int64)
    loss = flow_matching_loss(transformer, photographs, labels, noise, sigma, prompts)
    torch.testing.assert_close(loss, (noise - images_to_tokens(photographs)).pow(2).mean())


def test_prompt_and_noise_level_reach_the_output():
    transformer, prompts = random_last_layer(build_transformer(0)), Prompts.random(2, 0, torch.device("cpu"))
    noisy = torch.randn(1, GRID**2, TOKEN_CHANNELS, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    output = predict_velocity(transformer, noisy, torch.tensor([0.5, 0.5, 0.7]), prompts, torch.tensor([0, 1, 0]))
    assert not torch.allclose(output[0], output[1], atol=1e-3)
    assert not torch.allclose(output[0], output[2], atol=1e-3)


def test_pipeline_samples_by_euler_steps():
    """`FluxPipeline` walks the same path as four plain Euler steps over the model."""
    transformer, prompts = random_last_layer(build_transformer(0)), Prompts.random(2, 0, torch.device("cpu"))
    images = sample_images(transformer, prompts, label=1, count=2, seed=3, steps=4)
    assert images.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    side = 2 * GRID
    tokens = torch.randn(2, TOKEN_CHANNELS // 4, side, side, generator=torch.Generator().manual_seed(3))
    tokens = tokens.unflatten(2, (GRID, 2)).unflatten(4, (GRID, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    with torch.no_grad():
        for sigma in (1.0, 0.75, 0.5, 0.25):
            tokens = tokens - 0.25 * predict_velocity(transformer, tokens, torch.full((2,), sigma), prompts, torch.tensor([1, 1]))
    torch.testing.assert_close(images, tokens_to_images(tokens), rtol=1e-4, atol=1e-4)


def test_lora_trains_the_adapter_only():
    transformer = build_transformer(0)
    parameters = add_lora(transformer, seed=0)
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert len(parameters) == len(trained) > 0
    assert all("lora_" in name for name in trained)
    assert {name.split(".")[0] for name in trained} >= {"transformer_blocks", "single_transformer_blocks"}
