"""What an op keeps of a tensor for its backward pass: scaled 8-bit codes, or with fmt "none" the values. Shared by ops on rows [..., D]."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..backends import require_backend
from ..formats.scaled8 import check_format, check_group, decode, encode, num_row_groups

#: Dtypes of tensors; float64 is served by the reference alone, on CPUs (gradcheck).
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: float32, for float64 float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_dtype(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {dtype}; {name}.float() converts")
    if dtype == torch.float64 and device.type not in ("cpu", "meta"):
        raise TypeError(f"{name} is float64 on {device}: kernels compute in float32; pass {name}.float(), or run on the CPU")


def check_rows(name: str, x: Tensor) -> None:
    """A tensor [..., D] that ops on rows take."""
    check_dtype(name, x.dtype, x.device)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} needs a last dimension of at least one element, got shape {tuple(x.shape)}")


def check_same(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same shape, dtype and device."""
    if x.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)} and {other_name} {tuple(other.shape)}; they must agree")
    if x.dtype != other.dtype:
        raise TypeError(f"{name} is {x.dtype} and {other_name} {other.dtype}; they must agree")
    check_device(name, x, other_name, other)


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device} and {other_name} on {other.device}; move them to one device")


def check_segments(name: str, factor: Tensor, x: Tensor) -> int:
    """Of a factor [D] or [S, D] for `x` [..., D], whose rows come in S equal runs: S."""
    if not factor.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {factor.dtype}")
    if factor.ndim not in (1, 2) or factor.shape[-1] != x.shape[-1]:
        raise ValueError(f"{name} must have shape [{x.shape[-1]}] or [segments, {x.shape[-1]}], got {tuple(factor.shape)}")
    segments = 1 if factor.ndim == 1 else factor.shape[0]
    check_divides(name, segments, x)
    check_device(name, factor, "x", x)
    return segments


def by_segment(name: str, factor: Tensor, x: Tensor) -> Tensor:
    """A factor [D], [B, D], [B, 1, D], ..., B the leading dimension of `x`, as [D] or [S, D]."""
    if factor.ndim <= 1:
        return factor
    leading = factor.shape[:-1]
    while len(leading) > 1 and leading[-1] == 1:
        leading = leading[:-1]
    if factor.shape[-1] != x.shape[-1] or (tuple(leading) != (1,) and tuple(leading) != tuple(x.shape[: len(leading)])):
        raise ValueError(
            f"{name} of shape {tuple(factor.shape)} does not broadcast over x of shape {tuple(x.shape)}: pass [D], or [B, D] or [B, 1, D] "
            "with B the leading dimension of x"
        )
    return factor.reshape(-1, factor.shape[-1])


def check_divides(name: str, segments: int, x: Tensor) -> None:
    rows = x.numel() // x.shape[-1]
    if segments < 1 or rows % segments:
        raise ValueError(f"{name} has {segments} segments, which do not divide the {rows} rows of shape {tuple(x.shape)}")


def check_stored(codes: Tensor, scale: Tensor, fmt: str, group_size: int) -> None:
    """Codes and scales as `store_values` returns them."""
    check_format(fmt, allow_none=True)
    check_group(group_size)
    if fmt == "none":
        check_rows("codes", codes)
        if scale.numel():
            raise ValueError(f"fmt 'none' has no scales, got {scale.numel()}; pass the empty tensor that the forward pass returned")
        return
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be torch.uint8, got {codes.dtype}")
    want = (*codes.shape[:-1], num_row_groups(codes.shape[-1], group_size)) if codes.ndim else ()
    if codes.ndim == 0 or tuple(scale.shape) != want:
        raise ValueError(f"codes of shape {tuple(codes.shape)} in groups of {group_size} have scales {want}, got {tuple(scale.shape)}")
    check_device("codes", codes, "scale", scale)


def store_values(values: Tensor, dtype: torch.dtype, fmt: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 and scales of `values` [..., D]; fmt "none": themselves in `dtype`, and an empty tensor."""
    if fmt == "none":
        return values.to(dtype), values.new_empty(0, dtype=torch.float32)
    codes, scale = encode(values, fmt, group_size)
    return codes, scale.to(torch.float32)


def stored_values(codes: Tensor, scale: Tensor, fmt: str, group_size: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `store_values`, in `dtype`."""
    return codes.to(dtype) if fmt == "none" else decode(codes, scale, fmt, group_size, dtype)


def empty_stored(x: Tensor, fmt: str, group_size: int, save: bool = True) -> tuple[Tensor, Tensor]:
    """Uninitialised outputs for the codes and scales of `x`; without `save` empty ones."""
    if not save:
        return x.new_empty(0, dtype=torch.uint8), x.new_empty(0, dtype=torch.float32)
    if fmt == "none":
        return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(0, dtype=torch.float32)
    groups = num_row_groups(x.shape[-1], group_size)
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


def contiguous(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.contiguous()


def kernel_factor(factor: Tensor | None) -> Any:
    """A factor in a dtype that kernels read."""
    return factor.float() if factor is not None and factor.dtype == torch.float64 else factor


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies, for kernels; 0 for None (and of an empty tensor)."""
    return 0 if tensor is None else tensor.data_ptr()


def backend_of(op: str, x: Tensor, reference: Any, cpu: Any) -> Any:
    """The module that runs `op`: float64 is the reference's."""
    if x.dtype == torch.float64:
        return reference
    chosen = require_backend(op, x.device)
    if chosen == "Triton":
        return import_module(f"{__package__}.{op}.triton")
    return cpu if chosen == "C++" else reference
