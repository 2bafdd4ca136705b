"""The small FLUX that the demo trains: diffusers' own transformer, pipeline and LoRA, at a size two CPU cores can train.

There is no autoencoder and no text encoder: `latents.py` stands in for the one, and the "prompt" of a class is a fixed random embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from .latents import FOLD, GRID, LATENT_SIZE, TOKEN_CHANNELS, tokens_to_images

TEXT_TOKENS = 4
TEXT_CHANNELS = 64
LORA_RANK = 16
# The linear layers of diffusers' FLUX LoRA script, and those of the single-stream blocks, which hold most of this small model.
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
)


def build_transformer(seed: int) -> FluxTransformer2DModel:
    """A small FLUX transformer with random weights, on the CPU in float32.

    The modulations and the last layer start at zero, as in DiT (arXiv 2212.09748): diffusers leaves them random, because it expects a
    checkpoint to be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=TOKEN_CHANNELS,
            num_layers=1,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=TEXT_CHANNELS,
            pooled_projection_dim=TEXT_CHANNELS,
            axes_dims_rope=(4, 14, 14),
        )
    for name, parameter in transformer.named_parameters():
        if name.startswith("proj_out.") or ("norm" in name and ".linear." in name):
            nn.init.zeros_(parameter)
    return transformer


def add_lora(transformer: FluxTransformer2DModel, seed: int) -> list[nn.Parameter]:
    """Freeze the transformer, put a LoRA adapter on it (PEFT, in place) and return the adapter's parameters."""
    transformer.requires_grad_(False)
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class Prompts:
    """What the text encoders would say of each class: fixed random embeddings.

    Attributes:
        tokens: float32 [n_classes, TEXT_TOKENS, TEXT_CHANNELS], for `encoder_hidden_states`.
        pooled: float32 [n_classes, TEXT_CHANNELS], for `pooled_projections`.
    """

    tokens: Tensor
    pooled: Tensor

    @classmethod
    def random(cls, n_classes: int, seed: int, device: torch.device) -> Prompts:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(n_classes, TEXT_TOKENS, TEXT_CHANNELS, generator=generator)
        return cls(tokens.to(device), torch.randn(n_classes, TEXT_CHANNELS, generator=generator).to(device))


def predict_velocity(transformer: FluxTransformer2DModel, noisy: Tensor, sigma: Tensor, prompts: Prompts, labels: Tensor) -> Tensor:
    """The transformer's estimate of noise - image.

    Args:
        noisy: packed latents [batch, tokens, channels].
        sigma: noise level [batch], 0 .. 1.
        labels: class of each sample, int64 [batch].

    Returns:
        [batch, tokens, channels]
    """
    return transformer(
        hidden_states=noisy,
        encoder_hidden_states=prompts.tokens[labels],
        pooled_projections=prompts.pooled[labels],
        timestep=sigma,
        img_ids=FluxPipeline._prepare_latent_image_ids(len(noisy), GRID, GRID, noisy.device, noisy.dtype),
        txt_ids=torch.zeros(TEXT_TOKENS, 3, device=noisy.device, dtype=noisy.dtype),
        return_dict=False,
    )[0]


def build_pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    """diffusers' pipeline around the transformer, without the autoencoder and text encoders that this model does not have."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_images(transformer: FluxTransformer2DModel, prompts: Prompts, label: int, count: int, seed: int, steps: int = 24) -> Tensor:
    """Images of one class, by `FluxPipeline` with Euler steps.

    Returns:
        float32 [count, 3, IMAGE_SIZE, IMAGE_SIZE] on the CPU; about -1 .. 1, not clamped.
    """
    pipeline = build_pipeline(transformer)
    labels = torch.full((count,), label, device=prompts.tokens.device)
    size = LATENT_SIZE // FOLD * pipeline.vae_scale_factor
    tokens = pipeline(
        prompt_embeds=prompts.tokens[labels],
        pooled_prompt_embeds=prompts.pooled[labels],
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    return tokens_to_images(tokens).float().cpu()


def save_lora(transformer: FluxTransformer2DModel, folder: Path) -> Path:
    """Write the adapter as diffusers does and return the file."""
    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


def load_lora(base: Path, lora: Path, device: torch.device) -> FluxTransformer2DModel:
    """The transformer saved in folder `base`, with the LoRA of folder `lora` put on it by `FluxPipeline.load_lora_weights`."""
    pipeline = build_pipeline(FluxTransformer2DModel.from_pretrained(base).to(device))
    pipeline.load_lora_weights(lora)
    return pipeline.transformer
