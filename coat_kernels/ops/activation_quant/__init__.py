"""Activations in 8 bits, in groups of a row: the ops `quantize_activation` and `dequantize_activation` and their public wrappers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...formats.scaled8 import check_format, check_group, num_row_groups
from .._library import LIBRARY, register
from ..quantized import check_encoded, check_input, quantizer_of
from ..row_values import wide_dtype
from . import cpu, reference

LIBRARY.define("quantize_activation(Tensor x, str fmt, int group_size) -> (Tensor, Tensor)")
LIBRARY.define("dequantize_activation(Tensor codes, Tensor scale, str fmt, int group_size, ScalarType dtype) -> Tensor")


@dataclass(frozen=True)
class ActivationQuantized:
    """A tensor as 8-bit codes with a scale for each group of a row; layout: `coat_kernels/formats/README.md`, "Scaled 8-bit".

    Args:
        codes: uint8 [..., D], shape of the tensor.
        scale: float32 [..., ceil(D / group_size)]; "auto": negative where the group is int8.
        fmt: "e4m3", "e5m2", "int8" or "auto".
        group_size: elements a group.
    """

    codes: Tensor
    scale: Tensor
    fmt: str
    group_size: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


def _quantize_activation_arguments(x: Tensor, fmt: str, group_size: int) -> tuple[Any, ...]:
    check_format(fmt)
    check_group(group_size)
    check_input(x)
    return x, fmt, group_size, torch.Size((*x.shape[:-1], num_row_groups(x.shape[-1], group_size)))


def _quantize_activation(x: Tensor, fmt: str, group_size: int, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    return _backend(x, x.dtype).quantize_activation(x.contiguous(), fmt, group_size, scale_shape)


def _quantize_activation_fake(x: Tensor, fmt: str, group_size: int, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(scale_shape, dtype=wide_dtype(x.dtype))


def _dequantize_activation_arguments(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    check_format(fmt)
    check_group(group_size)
    check_encoded(codes, scale, dtype)
    if codes.dim() == 0:
        raise ValueError("groups run along the last dimension and codes of shape () have none; pass codes.view(1)")
    want = (*codes.shape[:-1], num_row_groups(codes.shape[-1], group_size))
    if tuple(scale.shape) != want:
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} in groups of {group_size} need a scale of shape {want}, got {tuple(scale.shape)}"
        )
    return codes, scale, fmt, group_size, dtype


def _dequantize_activation(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    return _backend(codes, dtype).dequantize_activation(codes.contiguous(), scale.contiguous(), fmt, group_size, dtype)


def _dequantize_activation_fake(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _backend(tensor: Tensor, dtype: torch.dtype) -> Any:
    return quantizer_of("activation_quant", tensor, dtype, reference, cpu)


register("quantize_activation", _quantize_activation_arguments, _quantize_activation, _quantize_activation_fake)
register("dequantize_activation", _dequantize_activation_arguments, _dequantize_activation, _dequantize_activation_fake)


def quantize_activation(x: Tensor, fmt: str = "e4m3", group_size: int = 128) -> ActivationQuantized:
    """Quantize a tensor to one byte an element, in groups along its last dimension.

    Args:
        x: float32, bfloat16 or float16, [..., D], any device; float64 on CPUs (scales are float64 then). The last group of a row may be
            shorter.
        fmt: "e4m3", "e5m2", "int8", or "auto": for each group e4m3 or int8, whichever loses less (COAT, arXiv 2410.19313, section 4, has
            FP8 alone).
        group_size: 16, 32, 64, 128 or 256.

    Returns:
        `ActivationQuantized`; `dequantize_activation` inverts it. NaN and infinite elements come back as NaN, zeros as +0.0.

    Raises:
        ValueError: an unknown format, a group size that is not offered, a tensor without dimensions.
        TypeError: x is no float tensor.
        BackendUnavailable: no kernel for x's device.
    """
    codes, scale = torch.ops.coat_kernels.quantize_activation(x.detach(), fmt, group_size)
    return ActivationQuantized(codes, scale, fmt, group_size)


def dequantize_activation(q: ActivationQuantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of an `ActivationQuantized`, in its codes' shape.

    Args:
        q: from `quantize_activation`.
        dtype: float32, bfloat16 or float16; float64 on CPUs.
    """
    return torch.ops.coat_kernels.dequantize_activation(q.codes, q.scale, q.fmt, q.group_size, dtype)
