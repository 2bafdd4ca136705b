"""Norms that save the normalized input in 8 bits and let what reads their output save nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.norm import layer_norm, layer_norm_modulate, norm
from ..config import COATConfig
from ._swap import Saving8Bit, Unconvertible, swap

#: Class -> where eps stands, the dtype of the result ("input"; "weight": the weight's; "promote": the wider one), weights from one.
RMS_NORMS: dict[str, tuple[str, str, bool]] = {
    "torch.nn.modules.normalization.RMSNorm": ("eps", "input", False),
    "diffusers.models.normalization.RMSNorm": ("eps", "weight", False),
    "diffusers.models.normalization.MochiRMSNorm": ("eps", "input", False),
    **{
        f"transformers.models.{model}.modeling_{model}.{name}RMSNorm": ("variance_epsilon", "promote", False)
        for model, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"), ("phi3", "Phi3"))
    },
    **{
        f"transformers.models.{model}.modeling_{model}.{name}RMSNorm": ("eps", "input", True)
        for model, name in (("gemma", "Gemma"), ("gemma2", "Gemma2"), ("gemma3", "Gemma3"))
    },
}


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class RMSNormForward(Saving8Bit):
    """The forward pass of every class in `RMS_NORMS`."""

    weight: Any  # a parameter or None
    coat_rms: tuple[str, str, bool] = RMS_NORMS["torch.nn.modules.normalization.RMSNorm"]

    def forward(self, x: Tensor) -> Tensor:
        shape = getattr(self, "normalized_shape", None) if self.weight is None else self.weight.shape
        if shape is not None:
            _check_width(self, x, shape[-1])
        attribute, dtype_rule, plus_one = self.coat_rms
        eps = getattr(self, attribute)
        if eps is None:  # as torch: of the dtype that is computed in
            eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        if self.weight is not None and dtype_rule != "input":
            x = x.to(self.weight.dtype if dtype_rule == "weight" else torch.promote_types(self.weight.dtype, x.dtype))
        shift = getattr(self, "bias", None)
        return norm(x, self.weight, shift, center=False, plus_one=plus_one, eps=eps, **self._format)


class FP8RMSNorm(RMSNormForward, nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension that saves 8 bits an element.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as of `nn.RMSNorm`; one dimension.
        config: `COATConfig`: `activation_format` and `activation_group_size`.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        config: COATConfig | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        _check_one_dimension(self.normalized_shape)
        self.coat_config = config or COATConfig()

    @classmethod
    def from_norm(cls, module: nn.Module, config: COATConfig | None = None) -> nn.Module:
        """Make an RMSNorm of torch, diffusers or transformers (`RMS_NORMS`) save 8 bits, in place; it stays an instance of its class.

        Raises:
            TypeError: the class is not known.
            ValueError: it normalizes several dimensions.
        """
        known = RMS_NORMS.get(path_of(type(module)))
        if known is None:
            raise TypeError(f"{path_of(type(module))} is not a known RMSNorm; known are {', '.join(RMS_NORMS)}")
        try:
            convert_rms_norm(module, config or COATConfig())
        except Unconvertible as reason:
            raise ValueError(str(reason)) from None
        return module


class FP8LayerNorm(Saving8Bit, nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension that saves 8 bits an element.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as of `nn.LayerNorm`; one dimension.
        config: `COATConfig`: `activation_format` and `activation_group_size`.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        config: COATConfig | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        _check_one_dimension(self.normalized_shape)
        self.coat_config = config or COATConfig()

    @classmethod
    def from_norm(cls, module: nn.LayerNorm, config: COATConfig | None = None) -> nn.LayerNorm:
        """Make an `nn.LayerNorm` save 8 bits, in place.

        Raises:
            TypeError: no `nn.LayerNorm`, or a subclass, whose own forward pass would be lost.
            ValueError: it normalizes several dimensions.
        """
        if type(module) is not nn.LayerNorm:
            raise TypeError(f"from_norm takes a torch.nn.LayerNorm, got {path_of(type(module))}")
        try:
            convert_layer_norm(module, config or COATConfig())
        except Unconvertible as reason:
            raise ValueError(str(reason)) from None
        return module

    def forward(self, input: Tensor) -> Tensor:
        _check_width(self, input, self.normalized_shape[0])
        return layer_norm(input, self.weight, self.bias, self.eps, **self._format)


class FP8AdaLayerNorm(Saving8Bit, nn.Module):
    """layer_norm(x) · (1 + scale) + shift: the modulated norm of diffusion transformers, in one pass, saving 8 bits an element.

    Args:
        dim: length of x's last dimension.
        eps: added to the variance.
        config: `COATConfig`: `activation_format` and `activation_group_size`.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, config: COATConfig | None = None) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.coat_config = config or COATConfig()

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x [B, ..., dim]; scale and shift [B, dim] or [B, 1, dim], broadcast over tokens. The result has x's shape and dtype."""
        _check_width(self, x, self.dim)
        return layer_norm_modulate(x, scale, shift, self.eps, **self._format)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


def _check_width(module: nn.Module | Saving8Bit, x: Tensor, width: int) -> None:
    if x.shape[-1:] != (width,):
        raise ValueError(f"{type(module).__name__} normalizes a last dimension of {width}, got x of shape {tuple(x.shape)}")


def _check_one_dimension(shape: Any) -> None:
    if len(shape) != 1:
        raise ValueError(f"normalized_shape must have one dimension, the last one, got {tuple(shape)}")


def convert_layer_norm(module: nn.Module, config: COATConfig) -> str:
    if len(module.normalized_shape) != 1:  # type: ignore[arg-type]
        raise Unconvertible(f"it normalizes {len(module.normalized_shape)} dimensions")  # type: ignore[arg-type]
    swap(module, FP8LayerNorm, config)
    return "FP8LayerNorm"


def convert_rms_norm(module: nn.Module, config: COATConfig) -> str:
    shape: Any = getattr(module, "normalized_shape", None) or getattr(module, "dim", None)
    if isinstance(shape, tuple) and len(shape) != 1:
        raise Unconvertible(f"it normalizes {len(shape)} dimensions")
    rule = RMS_NORMS[path_of(type(module))]
    swap(module, FP8RMSNorm if type(module) is nn.RMSNorm else RMSNormForward, config)
    module.coat_rms = rule  # type: ignore[assignment]
    return "FP8RMSNorm"
