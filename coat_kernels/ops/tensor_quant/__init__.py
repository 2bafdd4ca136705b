"""Two-stage group scaling (COAT, arXiv 2410.19313, section 4.2): one just-in-time scale for a tensor, or for each of its rows.

Stage one finds the largest magnitude of each group, stage two takes the largest of those and quantizes. A kernel that produces a tensor
can write the maxima as it goes; `quantize_with_amax` is stage two alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...formats.scaled8 import check_group, check_single_format, num_row_groups
from .._library import LIBRARY, register
from ..quantized import check_encoded, check_input, quantizer_of
from ..row_values import wide_dtype
from . import cpu, reference

LIBRARY.define("quantize_tensor(Tensor x, str fmt, int group_size, bool per_row) -> (Tensor, Tensor, Tensor)")
LIBRARY.define("quantize_with_amax(Tensor x, Tensor group_amax, str fmt, bool per_row) -> (Tensor, Tensor)")
LIBRARY.define("dequantize_tensor(Tensor codes, Tensor scale, str fmt, ScalarType dtype) -> Tensor")
LIBRARY.define("transpose_codes(Tensor codes) -> Tensor")

_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class TensorQuantized:
    """A tensor as 8-bit codes with one scale, or one for each row; rule: `coat_kernels/formats/README.md`, "Scaled 8-bit".

    Args:
        codes: uint8, shape of the tensor.
        scale: float32, 0-dimensional, or [..., 1] with a scale for each row.
        group_amax: float32 [..., ceil(D / group_size)], the largest finite magnitude of each group.
        fmt: "e4m3", "e5m2" or "int8".
    """

    codes: Tensor
    scale: Tensor
    group_amax: Tensor
    fmt: str

    @property
    def float8(self) -> Tensor:
        """The codes as torch's float8 dtype, for `torch._scaled_mm`; no copy."""
        if self.fmt not in _FLOAT8:
            raise ValueError(f"{self.fmt} codes are no float8; read them with .codes.view(torch.int8)")
        return self.codes.view(_FLOAT8[self.fmt])

    @property
    def nbytes(self) -> int:
        """Of codes and scale; the maxima are not needed again."""
        return self.codes.nbytes + self.scale.nbytes


def _scale_shape(shape: torch.Size, per_row: bool) -> torch.Size:
    return torch.Size((*shape[:-1], 1)) if per_row else torch.Size(())


def _backend(tensor: Tensor, dtype: torch.dtype) -> Any:
    return quantizer_of("tensor_quant", tensor, dtype, reference, cpu)


def _quantize_tensor_arguments(x: Tensor, fmt: str, group_size: int, per_row: bool) -> tuple[Any, ...]:
    check_single_format(fmt)
    check_input(x)
    check_group(group_size)
    amax_shape = torch.Size((*x.shape[:-1], num_row_groups(x.shape[-1], group_size)))
    return x, fmt, group_size, amax_shape, _scale_shape(x.shape, per_row)


def _quantize_tensor(
    x: Tensor, fmt: str, group_size: int, amax_shape: torch.Size, scale_shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    backend, x = _backend(x, x.dtype), x.contiguous()
    group_amax = backend.group_amax(x, group_size=group_size, amax_shape=amax_shape)
    return (*backend.quantize_with_amax(x, group_amax, fmt=fmt, scale_shape=scale_shape), group_amax)


def _quantize_tensor_fake(
    x: Tensor, fmt: str, group_size: int, amax_shape: torch.Size, scale_shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    group_amax = x.new_empty(amax_shape, dtype=wide_dtype(x.dtype))
    return (*_quantize_with_amax_fake(x, group_amax, fmt, scale_shape), group_amax)


def _quantize_with_amax_arguments(x: Tensor, group_amax: Tensor, fmt: str, per_row: bool) -> tuple[Any, ...]:
    check_single_format(fmt)
    check_input(x)
    want = wide_dtype(x.dtype)
    if group_amax.dtype != want:
        raise TypeError(f"group_amax must be {want} for x of {x.dtype}, got {group_amax.dtype}")
    if group_amax.dim() != x.dim() or group_amax.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"x of shape {tuple(x.shape)} needs maxima of shape {(*x.shape[:-1], 'groups')}, got {tuple(group_amax.shape)}")
    if group_amax.device != x.device:
        raise ValueError(f"x lies on {x.device} and group_amax on {group_amax.device}; they must share a device")
    return x, group_amax, fmt, _scale_shape(x.shape, per_row)


def _quantize_with_amax(x: Tensor, group_amax: Tensor, fmt: str, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    return _backend(x, x.dtype).quantize_with_amax(x.contiguous(), group_amax.contiguous(), fmt=fmt, scale_shape=scale_shape)


def _quantize_with_amax_fake(x: Tensor, group_amax: Tensor, fmt: str, scale_shape: torch.Size) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(scale_shape, dtype=wide_dtype(x.dtype))


def _dequantize_tensor_arguments(codes: Tensor, scale: Tensor, fmt: str, dtype: torch.dtype) -> tuple[Any, ...]:
    check_single_format(fmt)
    check_encoded(codes, scale, dtype)
    if scale.dim() != 0 and scale.shape != _scale_shape(codes.shape, True):
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} need a scale of shape () or {tuple(_scale_shape(codes.shape, True))}, "
            f"got {tuple(scale.shape)}"
        )
    return codes, scale, fmt, dtype


def _dequantize_tensor(codes: Tensor, scale: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    return _backend(codes, dtype).dequantize_tensor(codes.contiguous(), scale.contiguous(), fmt=fmt, dtype=dtype)


def _dequantize_tensor_fake(codes: Tensor, scale: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _transpose_codes_arguments(codes: Tensor) -> tuple[Any, ...]:
    if codes.dim() != 2 or codes.element_size() != 1:
        raise ValueError(f"a matrix of one-byte codes is needed, got shape {tuple(codes.shape)} of {codes.dtype}")
    return (codes,)


def _transpose_codes(codes: Tensor) -> Tensor:
    return _backend(codes, torch.uint8).transpose_codes(codes.contiguous())


def _transpose_codes_fake(codes: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[1], codes.shape[0]))


register("quantize_tensor", _quantize_tensor_arguments, _quantize_tensor, _quantize_tensor_fake)
register("quantize_with_amax", _quantize_with_amax_arguments, _quantize_with_amax, _quantize_with_amax_fake)
register("dequantize_tensor", _dequantize_tensor_arguments, _dequantize_tensor, _dequantize_tensor_fake)
register("transpose_codes", _transpose_codes_arguments, _transpose_codes, _transpose_codes_fake)


def quantize_tensor(x: Tensor, fmt: str = "e4m3", group_size: int = 128, *, per_row: bool = False) -> TensorQuantized:
    """Quantize a tensor to one byte an element with a scale of its own maximum, of now and not of earlier steps.

    Args:
        x: float32, bfloat16 or float16, [..., D], any device; float64 on CPUs.
        fmt: "e4m3", "e5m2" or "int8".
        group_size: 16, 32, 64, 128 or 256: of the maxima that stage one writes; codes and scale do not depend on it.
        per_row: a scale for each row (the last dimension) instead of one for the tensor.

    Returns:
        `TensorQuantized`; `dequantize_tensor` inverts it. NaN and infinite elements come back as NaN.

    Raises:
        ValueError: an unknown format, a group size that is not offered, a tensor without dimensions.
        TypeError: x is no float tensor.
        BackendUnavailable: no kernel for x's device.
    """
    codes, scale, group_amax = torch.ops.coat_kernels.quantize_tensor(x.detach(), fmt, group_size, per_row)
    return TensorQuantized(codes, scale, group_amax, fmt)


def dequantize_tensor(q: TensorQuantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a `TensorQuantized`, in its codes' shape.

    Args:
        q: from `quantize_tensor`.
        dtype: float32, bfloat16 or float16; float64 on CPUs.
    """
    return torch.ops.coat_kernels.dequantize_tensor(q.codes, q.scale, q.fmt, dtype)
