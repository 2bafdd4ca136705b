"""What the ops that quantize a tensor or decode its codes share: checks, and the choice of a backend."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..backends import require_backend
from .row_values import DTYPES


def check_float(dtype: torch.dtype, what: str) -> None:
    """`what` names the tensor."""
    if dtype not in DTYPES:
        raise TypeError(f"{what} has dtype {dtype}; pass float32, bfloat16 or float16 (x.float() converts)")


def check_input(x: Tensor) -> None:
    """Of ops that quantize."""
    check_float(x.dtype, "x")
    if x.dim() == 0:
        raise ValueError("groups run along the last dimension and a tensor of shape () has none; pass x.view(1)")


def check_encoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Dtypes and devices of ops that decode to `dtype`; shapes are the op's."""
    check_float(dtype, "the result")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be torch.uint8, got {codes.dtype} (codes.view(torch.uint8) reads float8 codes)")
    if not (scale.dtype == torch.float32 or (scale.dtype == torch.float64 and dtype == torch.float64)):
        raise TypeError(f"scale must be torch.float32, got {scale.dtype}")
    if scale.device != codes.device:
        raise ValueError(f"codes lie on {codes.device} and scale on {scale.device}; they must share a device")


def quantizer_of(op: str, tensor: Tensor, dtype: torch.dtype, reference: Any, cpu: Any) -> Any:
    """The module that runs `op` for values of `dtype`: float64 is the reference's, on CPUs."""
    chosen = require_backend(op, tensor.device)
    if chosen == "Triton":
        if dtype == torch.float64:
            raise TypeError("kernels compute in float32: float64 activations are quantized on CPUs only; pass x.float()")
        return import_module(f"{__package__}.{op}.triton")
    return cpu if chosen == "C++" and dtype != torch.float64 else reference
