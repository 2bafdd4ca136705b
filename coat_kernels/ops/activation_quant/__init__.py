"""Activations in 8 bits, in groups of a row: the ops `quantize_activation` and `dequantize_activation` and their public wrappers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...backends import require_backend
from ...formats.scaled8 import check_format, check_group, num_row_groups
from .._library import LIBRARY
from . import cpu, reference

LIBRARY.define("quantize_activation(Tensor x, str fmt, int group_size) -> (Tensor, Tensor)")
LIBRARY.define("dequantize_activation(Tensor codes, Tensor scale, str fmt, int group_size, ScalarType dtype) -> Tensor")

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def check_activation_dtype(dtype: torch.dtype, what: str) -> None:
    """Shared by the ops that read or write activations; `what` names the tensor."""
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"{what} has dtype {dtype}; pass float32, bfloat16 or float16 (x.float() converts)")


def check_quantize_activation(x: Tensor, fmt: str, group_size: int) -> torch.Size:
    """The checks that the op and its fake share; returns the shape of the scales."""
    check_format(fmt)
    check_group(group_size)
    check_activation_dtype(x.dtype, "x")
    if x.dim() == 0:
        raise ValueError("groups run along the last dimension and a tensor of shape () has none; pass x.view(1)")
    return torch.Size((*x.shape[:-1], num_row_groups(x.shape[-1], group_size)))


def check_dequantize_activation(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype) -> None:
    """The checks that the op and its fake share."""
    check_format(fmt)
    check_group(group_size)
    check_activation_dtype(dtype, "the result")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be torch.uint8, got {codes.dtype} (codes.view(torch.uint8) reads float8 codes)")
    if not (scale.dtype == torch.float32 or (scale.dtype == torch.float64 and dtype == torch.float64)):
        raise TypeError(f"scale must be torch.float32, got {scale.dtype}")
    if codes.dim() == 0:
        raise ValueError("groups run along the last dimension and codes of shape () have none; pass codes.view(1)")
    want = (*codes.shape[:-1], num_row_groups(codes.shape[-1], group_size))
    if tuple(scale.shape) != want:
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} in groups of {group_size} need a scale of shape {want}, got {tuple(scale.shape)}"
        )
    if scale.device != codes.device:
        raise ValueError(f"codes lie on {codes.device} and scale on {scale.device}; they must share a device")


def _backend(tensor: Tensor, dtype: torch.dtype) -> Any:
    chosen = require_backend("activation_quant", tensor.device)
    if chosen == "Triton":
        if dtype == torch.float64:
            raise TypeError("kernels compute in float32: float64 activations are quantized on CPUs only; pass x.float()")
        return import_module(".triton", __package__)
    return cpu if chosen == "C++" and dtype != torch.float64 else reference


def _quantize_activation(x: Tensor, fmt: str, group_size: int) -> tuple[Tensor, Tensor]:
    scale_shape = check_quantize_activation(x, fmt, group_size)
    return _backend(x, x.dtype).quantize_activation(x.contiguous(), fmt=fmt, group_size=group_size, scale_shape=scale_shape)


def _dequantize_activation(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    check_dequantize_activation(codes, scale, fmt, group_size, dtype)
    backend = _backend(codes, dtype)
    return backend.dequantize_activation(codes.contiguous(), scale.contiguous(), fmt=fmt, group_size=group_size, dtype=dtype)


def _quantize_activation_fake(x: Tensor, fmt: str, group_size: int) -> tuple[Tensor, Tensor]:
    scale_shape = check_quantize_activation(x, fmt, group_size)
    scale_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(scale_shape, dtype=scale_dtype)


def _dequantize_activation_fake(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    check_dequantize_activation(codes, scale, fmt, group_size, dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("quantize_activation", _quantize_activation, _key)
    LIBRARY.impl("dequantize_activation", _dequantize_activation, _key)
torch.library.register_fake("coat_kernels::quantize_activation", _quantize_activation_fake, lib=LIBRARY)
torch.library.register_fake("coat_kernels::dequantize_activation", _dequantize_activation_fake, lib=LIBRARY)


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
