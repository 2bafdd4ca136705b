"""Forward passes for diffusers' modules: modulated norms, feed-forward projections, FLUX's and SD3's attention.

Each is the forward pass of the class it is named after, with this package's functions where that one calls torch's. diffusers is
never imported: a class is known by its path, and what else is needed is taken from the module it comes from.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._native import CoatWarning
from ..autograd.activation import gated, gelu
from ..autograd.norm import layer_norm, layer_norm_modulate
from ..autograd.norm_rope import check_norm_rope_weight, norm_rope
from ..config import COATConfig
from ._swap import Saving8Bit, Unconvertible, swap
from .norm import path_of

_LAYER_NORMS = ("torch.nn.modules.normalization.LayerNorm", "diffusers.models.normalization.FP32LayerNorm")


class _Modulated(Saving8Bit):
    """Modulation of a LayerNorm without weights by what `linear(silu(emb))` says."""

    silu: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor], Tensor]
    norm: Any
    emb: Any

    def _modulate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return layer_norm_modulate(x, scale, shift, self.norm.eps, **self._format)


class AdaLayerNormZero(_Modulated):
    def forward(
        self, x: Tensor, timestep: Any = None, class_labels: Any = None, hidden_dtype: Any = None, emb: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        assert emb is not None
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
        return self._modulate(x, scale_msa, shift_msa), gate_msa, shift_mlp, scale_mlp, gate_mlp


class AdaLayerNormZeroSingle(_Modulated):
    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        shift_msa, scale_msa, gate_msa = self.linear(self.silu(emb)).chunk(3, dim=1)
        return self._modulate(x, scale_msa, shift_msa), gate_msa


class AdaLayerNormContinuous(_Modulated):
    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return self._modulate(x, scale, shift)


class SD35AdaLayerNormZeroX(_Modulated):
    def forward(self, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        # one 8-bit copy serves both modulations, which a saved-tensor hook rebuilds from it
        normed = layer_norm(hidden_states, eps=self.norm.eps, **self._format)
        first = normed * (1 + scale[:, None]) + shift[:, None]
        second = normed * (1 + scale2[:, None]) + shift2[:, None]
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


class GELU(Saving8Bit):
    proj: Callable[[Tensor], Tensor]
    approximate: str

    def forward(self, hidden_states: Tensor) -> Tensor:
        return gelu(self.proj(hidden_states), self.approximate, **self._format)


class GEGLU(Saving8Bit):
    proj: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return gated(self.proj(hidden_states), "gelu", gate_first=False, **self._format)


class SwiGLU(Saving8Bit):
    proj: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return gated(self.proj(hidden_states), "silu", gate_first=False, **self._format)


class Flux2SwiGLU(Saving8Bit):
    def forward(self, x: Tensor) -> Tensor:
        return gated(x, "silu", gate_first=True, **self._format)


def _modulated(forward: type[_Modulated]) -> Callable[[nn.Module, COATConfig], str]:
    def convert(module: nn.Module, config: COATConfig) -> str:
        norm: Any = module.norm
        if path_of(type(norm)) not in _LAYER_NORMS or norm.weight is not None:
            raise Unconvertible(f"its norm is no LayerNorm without weights but {path_of(type(norm))}")
        swap(module, forward, config)
        return f"8-bit {forward.__name__}"

    return convert


def _feed_forward(forward: type[Saving8Bit]) -> Callable[[nn.Module, COATConfig], str]:
    def convert(module: nn.Module, config: COATConfig) -> str:
        swap(module, forward, config)
        return f"8-bit {forward.__name__}"

    return convert


class NormRopeProcessor:
    """Attention of FLUX: the q/k norms and the rotary embedding in one function that saves what attention saves.

    Text and image tokens are concatenated before the norms, not after: the function takes a second weight for the text. While a norm's
    weight is trained the original processor runs, since the function's backward pass divides by the weight.

    Weights too near to zero to divide by are looked for at conversion and whenever a state dictionary is loaded. One that is zeroed in
    place later keeps this processor, whose backward pass takes the element's normalized input as 0: a look at each step would make the
    host wait for the device.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        if any(norm.weight.requires_grad for norm in _head_norms(attn)):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        flux = sys.modules[_FLUX]
        projected = flux._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        joint = attn.added_kv_proj_dim is not None
        text_tokens = projected[3].shape[1] if joint else 0
        cos, sin = image_rotary_emb if image_rotary_emb is not None else (None, None)

        def heads(index: int) -> Tensor:
            parts = [projected[index + 3], projected[index]] if joint else [projected[index]]
            parts = [part.unflatten(-1, (-1, attn.head_dim)) for part in parts]
            return torch.cat(parts, dim=1) if joint else parts[0]

        def ready(index: int, norm: nn.RMSNorm, text_norm: nn.RMSNorm | None) -> Tensor:
            first = None if text_norm is None else text_norm.weight
            eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
            return norm_rope(heads(index), norm.weight, cos, sin, first_weight=first, first_tokens=text_tokens, eps=eps)

        query = ready(0, attn.norm_q, attn.norm_added_q if joint else None)
        key = ready(1, attn.norm_k, attn.norm_added_k if joint else None)
        out = flux.dispatch_attention_fn(
            query, key, heads(2), attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        out = out.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text_out, out = out.split_with_sizes([encoder_hidden_states.shape[1], out.shape[1] - encoder_hidden_states.shape[1]], dim=1)
        out = attn.to_out[1](attn.to_out[0](out.contiguous()))
        return out, attn.to_add_out(text_out.contiguous())


_FLUX = "diffusers.models.transformers.transformer_flux"
_NEEDED_OF_FLUX = ("_get_qkv_projections", "dispatch_attention_fn", "FluxAttnProcessor")


def _head_norms(attn: Any) -> list[Any]:
    return [attn.norm_q, attn.norm_k, *([attn.norm_added_q, attn.norm_added_k] if attn.added_kv_proj_dim is not None else [])]


def _check_head_norms(attn: Any) -> None:
    norms = _head_norms(attn)
    for norm in norms:
        if not isinstance(norm, nn.RMSNorm) or norm.weight is None:
            raise Unconvertible("its q and k norms are not RMSNorms with weights")
        if norm.eps != norms[0].eps:
            raise Unconvertible("its q and k norms differ in eps")
        try:
            if not norm.weight.is_meta:
                check_norm_rope_weight(norm.weight.detach())
        except ValueError as error:
            raise Unconvertible(str(error)) from None


def _check_loaded(attn: nn.Module, _incompatible_keys: Any) -> None:
    """After new weights were loaded: those that cannot be divided by bring the original processor back."""
    processor = attn.processor
    if isinstance(processor, NormRopeProcessor):
        try:
            _check_head_norms(attn)
        except Unconvertible as reason:
            attn.processor = processor.original
            warnings.warn(f"norm_rope does not run with the loaded weights, torch's norms do: {reason}", CoatWarning, stacklevel=2)


def convert_flux_attention(attn: nn.Module, config: COATConfig) -> str:
    flux = sys.modules[_FLUX]
    if not all(hasattr(flux, name) for name in _NEEDED_OF_FLUX):
        raise Unconvertible("this version of diffusers computes it differently")
    if type(attn.processor) is not flux.FluxAttnProcessor:
        raise Unconvertible(f"its processor is {type(attn.processor).__name__}, not FluxAttnProcessor")
    _check_head_norms(attn)
    attn.processor = NormRopeProcessor(attn.processor)  # type: ignore[assignment]
    attn.register_load_state_dict_post_hook(_check_loaded)
    return "attention with norm_rope"


Convert = Callable[[nn.Module, COATConfig], str]
_NORMALIZATION, _ACTIVATIONS = "diffusers.models.normalization", "diffusers.models.activations"

#: Class -> what converts it, and the children that it then does not call.
MODULES: dict[str, tuple[Convert, tuple[str, ...]]] = {
    **{
        f"{_NORMALIZATION}.{forward.__name__}": (_modulated(forward), ("silu", "norm"))
        for forward in (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous, SD35AdaLayerNormZeroX)
    },
    **{f"{_ACTIVATIONS}.{forward.__name__}": (_feed_forward(forward), ("activation",)) for forward in (GELU, GEGLU, SwiGLU)},
    "diffusers.models.transformers.transformer_flux2.Flux2SwiGLU": (_feed_forward(Flux2SwiGLU), ("gate_fn",)),
    f"{_FLUX}.FluxAttention": (convert_flux_attention, ()),
}
#: Modules whose activation functions see one row a sample.
CONDITIONING = "diffusers.models.embeddings."
