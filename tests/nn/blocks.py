"""Blocks of real models, with and without LoRA, and the bytes a token that their forward pass leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from coat_train.memory import LiveStorages
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LINEARS += ("proj_mlp", "proj_out", "net.0.proj", "net.2")
RANK = 4


@dataclass
class Block:
    """A block and what it is called with."""

    module: nn.Module
    inputs: dict[str, Any]
    tokens: int

    def run(self) -> tuple[Tensor, ...]:
        out = self.module(**self.inputs)
        return out if isinstance(out, tuple) else (out,)

    def saved_bytes(self) -> dict[str, int]:
        """Bytes a token of all storages that outlive the forward pass, by what made them; the block's own inputs count if they are kept.

        Rank-r outputs, log-sum-exp, row statistics and what has no token dimension are left out: storages of under 64 bytes a token.
        """
        with LiveStorages() as live:
            # made anew inside: a storage that only the graph keeps is seen
            inputs = {name: value.clone() if name.endswith("hidden_states") else value for name, value in self.inputs.items()}
            out = self.module(**inputs)
            del inputs
        alive = live.alive(out if isinstance(out, tuple) else (out,))
        return {name: size / self.tokens for name, size in alive.items() if size >= 64 * self.tokens}


def random_weights(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=0.02, generator=generator)


def add_lora(module: nn.Module, targets: tuple[str, ...] = LINEARS) -> None:
    """LoRA on the linear layers, in their dtype; B is not zero, so that every gradient is."""
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets), init_lora_weights=False), module)
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.dim() == 2)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def flux(kind: str, *, width: int, heads: int, image: int, text: int, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> Block:
    """diffusers' FLUX block, "single" or "double", with random weights."""
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxSingleTransformerBlock, FluxTransformerBlock

    cls = FluxSingleTransformerBlock if kind == "single" else FluxTransformerBlock
    head = width // heads
    with torch.device("meta"):
        module = cls(dim=width, num_attention_heads=heads, attention_head_dim=head)
    module = module.to_empty(device="cpu").to(dtype)
    random_weights(module)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    axes = (head // 8, head * 7 // 16, head * 7 // 16)
    positions = torch.zeros(text + image, 3)
    positions[text:, 1] = torch.arange(image) // 8
    positions[text:, 2] = torch.arange(image) % 8
    inputs = {
        "hidden_states": draw(batch, image, width).requires_grad_(),
        "encoder_hidden_states": draw(batch, text, width).requires_grad_(),
        "temb": draw(batch, width),
        "image_rotary_emb": FluxPosEmbed(10000, axes)(positions),
    }
    return Block(module, inputs, batch * (image + text))


def llama(*, width: int, heads: int, tokens: int, batch: int, dtype: torch.dtype = torch.bfloat16) -> Block:
    """transformers' Llama decoder layer, intermediate size 2.6875 of the width as in the 7B model, everything trained."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=width, intermediate_size=width * 43 // 16, num_attention_heads=heads, num_key_value_heads=heads)
    config._attn_implementation = "sdpa"
    module = LlamaDecoderLayer(config, 0).to(dtype)
    random_weights(module)
    hidden = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    positions = torch.arange(tokens)[None]
    rotary = LlamaRotaryEmbedding(config)(hidden.detach(), positions)
    return Block(module, {"hidden_states": hidden, "position_ids": positions, "position_embeddings": rotary}, batch * tokens)
