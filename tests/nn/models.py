"""Whole models of diffusers and transformers in small, with their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.nn.blocks import random_weights


@dataclass
class Case:
    """A model's builder, what it is called with and the tensor that it returns."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    output: Callable[[Any], Tensor]

    def gradients(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = self.output(model(**self.inputs()))
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
        (out - target).float().square().mean().backward()
        return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )


def _flux_inputs() -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    return {
        "hidden_states": draw(1, 2, 64, 4),
        "encoder_hidden_states": draw(2, 2, 16, 32),
        "pooled_projections": draw(3, 2, 32),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.stack([torch.zeros(64), rows.flatten(), columns.flatten()], 1),
        "txt_ids": torch.zeros(16, 3),
    }


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 2, 4, 16, 16),
        "encoder_hidden_states": draw(2, 2, 8, 32),
        "pooled_projections": draw(3, 2, 32),
        "timestep": torch.tensor([10.0, 500.0]),
    }


def _sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=8,
    )


def _sdxl_inputs() -> dict[str, Any]:
    return {
        "sample": draw(1, 2, 4, 16, 16),
        "timestep": 10,
        "encoder_hidden_states": draw(2, 2, 8, 64),
        "added_cond_kwargs": {"text_embeds": draw(3, 2, 32), "time_ids": draw(4, 2, 6)},
    }


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100))


def _random(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        torch.manual_seed(0)
        model = build()
        random_weights(model)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        return model

    return built


CASES = {
    "flux": Case(_random(_flux), _flux_inputs, lambda out: out.sample),
    "sd3": Case(_random(_sd3), _sd3_inputs, lambda out: out.sample),
    "sdxl": Case(_random(_sdxl), _sdxl_inputs, lambda out: out.sample),
    "llama": Case(
        _random(_llama),
        lambda: {"input_ids": torch.randint(0, 100, (2, 64), generator=torch.Generator().manual_seed(1))},
        lambda out: out.logits,
    ),
}
