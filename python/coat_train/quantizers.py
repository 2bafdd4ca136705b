"""Quantizers and wrappers under the names of users' COAT guides, over this package's formats and modules.

For code that was written against those names. New code calls what they stand for: `coat_kernels.quantize_group`, `quantize_activation`
and `quantize_tensor`, `coat_kernels.nn.FP8Linear` and `convert_to_coat`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coat_kernels import (
    ActivationQuantized,
    GroupQuantized,
    TensorQuantized,
    dequantize_activation,
    dequantize_group,
    dequantize_tensor,
    quantize_activation,
    quantize_group,
    quantize_tensor,
)
from coat_kernels.config import COATConfig, FP8QuantizationConfig
from coat_kernels.formats import codec_name, get_codec
from coat_kernels.formats.reference import group_metadata
from coat_kernels.nn import FP8GELU, FP8LayerNorm, FP8Linear, FP8RMSNorm, FP8SiLU, compress_saved_activations
from coat_kernels.nn import replace_linear_with_fp8 as convert_linears

_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_GRANULARITIES = ("per_tensor", "per_row", "per_group")


class DynamicRangeExpansion:
    """f(x) = sign(x)·|x|^k, which spreads the magnitudes of a group over the range of a format (COAT, arXiv 2410.19313, equation 3)."""

    @staticmethod
    def calculate_optimal_k(x: Tensor, eps: float = 0.0, fp8_format: str = "e4m3") -> float:
        """The k that `quantize_group` takes for x as one group: 1/16 to 255/16, in sixteenths (`coat_kernels/formats/README.md`).

        Args:
            x: float tensor of any shape. Of zeros, or empty: 1.
            eps: magnitudes up to eps count as zeros.
            fp8_format: "e4m3" or "e5m2".
        """
        codec = get_codec(codec_name(_checked_format(fp8_format), True))
        magnitude = x.detach().to(torch.float32).abs().reshape(-1)
        _, k16 = group_metadata(torch.where(magnitude > eps, magnitude, 0), codec, max(1, x.numel()))
        return k16.item() / 16 if x.numel() else 1.0

    @staticmethod
    def expand(x: Tensor, k: float | Tensor) -> Tensor:
        """sign(x)·|x|^k, in x's dtype. In float32 magnitudes under 2^(-126/k) flush to zero: divide by the largest one first."""
        return torch.sign(x) * x.abs() ** k

    @staticmethod
    def contract(x: Tensor, k: float | Tensor) -> Tensor:
        """The inverse of `expand`."""
        return torch.sign(x) * x.abs() ** (1 / k)


class FP8Quantizer:
    """Group quantization of optimizer states, one byte an element and five a group (`coat_kernels.quantize_group`).

    Args:
        config: `block_size` elements a group; `use_dynamic_range_expansion=False` switches expansion off for all calls.
    """

    def __init__(self, config: FP8QuantizationConfig | None = None) -> None:
        self.config = config or FP8QuantizationConfig()

    def quantize_per_group(self, tensor: Tensor, fp8_format: str = "e4m3", use_dre: bool = True) -> tuple[Tensor, dict[str, Any]]:
        """Codes in float8, of the tensor's shape, and what `dequantize_per_group` needs besides.

        Args:
            tensor: float32, bfloat16 or float16.
            fp8_format: "e4m3" or "e5m2".
            use_dre: with dynamic range expansion.

        Returns:
            codes, and a dictionary: `amax` float32 [n_groups], `k16` uint8 [n_groups] (16·k), `fmt`, `group_size`, `expand`, `shape`.
        """
        expand = use_dre and self.config.use_dynamic_range_expansion
        q = quantize_group(tensor, _checked_format(fp8_format), self.config.block_size, expand)
        names = ("amax", "k16", "fmt", "group_size", "expand", "shape")
        return q.codes.view(_FLOAT8[fp8_format]), {name: getattr(q, name) for name in names}

    def dequantize_per_group(self, quantized_tensor: Tensor, quant_params: dict[str, Any]) -> Tensor:
        """float32 values of what `quantize_per_group` returned."""
        return dequantize_group(GroupQuantized(codes=quantized_tensor.view(torch.uint8), **quant_params))


class FP8ActivationQuantizer:
    """Quantization of activations in COAT's mixed granularity.

    Args:
        linear_granularity: of what linear layers read: "per_tensor", "per_row" or "per_group".
        nonlinear_granularity: of what norms and activation functions read: the same.
        group_size: of "per_group", along the last dimension: 16, 32, 64, 128 or 256.

    Raises:
        ValueError: an unknown granularity.
    """

    def __init__(self, linear_granularity: str = "per_tensor", nonlinear_granularity: str = "per_group", group_size: int = 128) -> None:
        for name, value in (("linear_granularity", linear_granularity), ("nonlinear_granularity", nonlinear_granularity)):
            if value not in _GRANULARITIES:
                raise ValueError(f"unknown {name} {value!r}; choose {', '.join(map(repr, _GRANULARITIES))}")
        self.linear_granularity = linear_granularity
        self.nonlinear_granularity = nonlinear_granularity
        self.group_size = group_size

    def quantize(self, x: Tensor, layer_type: str = "linear") -> ActivationQuantized | TensorQuantized:
        """x in e4m3 for a layer: "linear", or "nonlinear" (also "layernorm"); `dequantize` inverts it."""
        granularity = self.linear_granularity if _is_linear(layer_type) else self.nonlinear_granularity
        if granularity == "per_group":
            return quantize_activation(x, "e4m3", self.group_size)
        return quantize_tensor(x, "e4m3", per_row=granularity == "per_row")

    def dequantize(self, q: ActivationQuantized | TensorQuantized, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantize_activation(q, dtype) if isinstance(q, ActivationQuantized) else dequantize_tensor(q, dtype)

    def quantize_per_tensor(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x as float8_e4m3fn with one scale, 0-dim float32. No value leaves the device."""
        q = quantize_tensor(x, "e4m3")
        return q.float8, q.scale

    def dequantize_per_tensor(self, x_fp8: Tensor, scale: Tensor | float) -> Tensor:
        """x_fp8·scale in float32."""
        return x_fp8.float() * scale

    def quantize_per_group_2stage(self, x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
        """x [..., D] as float8_e4m3fn of its shape, and float32 scales [..., ceil(D / group_size)]."""
        q = quantize_activation(x, "e4m3", group_size or self.group_size)
        return q.codes.view(torch.float8_e4m3fn), q.scale

    def dequantize_per_group_2stage(
        self,
        x_fp8: Tensor,
        scales: Tensor,
        original_shape: torch.Size | None = None,
        n_elements: int | None = None,
        group_size: int | None = None,
    ) -> Tensor:
        """float32 values of what `quantize_per_group_2stage` returned.

        Args:
            original_shape: of the result; None: the codes'.
            n_elements: checked.

        Raises:
            ValueError: the codes have another number of elements.
        """
        if n_elements is not None and n_elements != x_fp8.numel():
            raise ValueError(f"x_fp8 has {x_fp8.numel()} elements, not {n_elements}: codes are not padded here")
        q = ActivationQuantized(x_fp8.view(torch.uint8), scales, "e4m3", group_size or self.group_size)
        return dequantize_activation(q).view(original_shape or x_fp8.shape)


class FP8LinearWrapper(nn.Module):
    """A linear layer that saves its input in FP8, under the attribute `linear`; the output has the input's dtype.

    Args:
        linear_layer: an `nn.Linear`, converted in place (`FP8Linear.from_linear`).
        config: `COATConfig`.
    """

    def __init__(self, linear_layer: nn.Linear, config: COATConfig | None = None) -> None:
        super().__init__()
        self.linear = linear_layer if isinstance(linear_layer, FP8Linear) else FP8Linear.from_linear(linear_layer, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class FP8PrecisionFlow(nn.Module):
    """Runs modules so that what they save for the backward pass is FP8, whatever their class; outputs keep the model's dtype.

    Linear layers save per tensor, norms and activation functions per group (COAT, arXiv 2410.19313, section 4). The modules themselves
    are not changed, so their weights stay as they are; `convert_to_coat` changes a whole model, and costs less.

    Args:
        config: `COATConfig`, of which the activations' part is read.
    """

    def __init__(self, config: COATConfig | None = None) -> None:
        super().__init__()
        # a weight that the copy stored in FP8 would be gone from the module itself: both share one dictionary of parameters
        self.config = replace(config or COATConfig(), frozen_weight_format=None)

    def forward(self, module: nn.Module, x: Tensor, layer_type: str | None = None) -> Tensor:
        """`module(x)`.

        Args:
            module: an `nn.Linear`, `LayerNorm`, `RMSNorm`, `GELU` or `SiLU` runs in its 8-bit form; any other module inside
                `compress_saved_activations`.
            layer_type: "linear", "nonlinear" or "layernorm", which the module must fit; None: what it is.

        Raises:
            ValueError: module is no layer of this type, or the type is unknown.
        """
        if layer_type is not None and _is_linear(layer_type) != isinstance(module, nn.Linear):
            raise ValueError(f"layer_type={layer_type!r} does not fit a {type(module).__name__}; leave it out")
        twin = _TWINS.get(type(module))
        if twin is not None:
            return twin(copy.copy(module), self.config)(x)  # a shallow copy: the same parameters and hooks
        with compress_saved_activations(self.config):
            return module(x)

    forward_with_fp8_flow = forward


def _of_class(cls: type[FP8GELU] | type[FP8SiLU]) -> Callable[[Any, COATConfig], nn.Module]:
    def twin(module: Any, config: COATConfig) -> nn.Module:
        module.__class__, module.coat_config = cls, config
        return module

    return twin


_TWINS: dict[type, Callable[[Any, COATConfig], nn.Module]] = {
    nn.Linear: FP8Linear.from_linear,
    nn.LayerNorm: FP8LayerNorm.from_norm,
    nn.RMSNorm: FP8RMSNorm.from_norm,
    nn.GELU: _of_class(FP8GELU),
    nn.SiLU: _of_class(FP8SiLU),
}


def replace_linear_with_fp8(
    model: nn.Module,
    recursive: bool = True,
    *,
    config: COATConfig | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Turn the linear layers of a model into `FP8Linear`, in place (`coat_kernels.nn.replace_linear_with_fp8`).

    Args:
        model: converted in place and returned.
        recursive: False: only the layers that are direct children of the model.
        config, filter_fn: as there.
    """
    if not isinstance(recursive, bool):
        raise TypeError(f"recursive must be True or False, got {recursive!r}; config and filter_fn are passed by name")

    def accept(module: nn.Module, name: str) -> bool:
        return (recursive or "." not in name) and (filter_fn is None or filter_fn(module, name))

    return convert_linears(model, config, filter_fn if recursive else accept)


def _checked_format(fmt: str) -> str:
    if fmt not in _FLOAT8:
        raise ValueError(f"unknown fp8_format {fmt!r}; choose 'e4m3' or 'e5m2'")
    return fmt


def _is_linear(layer_type: str) -> bool:
    if layer_type not in ("linear", "nonlinear", "layernorm"):
        raise ValueError(f"unknown layer_type {layer_type!r}; choose 'linear', 'nonlinear' or 'layernorm'")
    return layer_type == "linear"
