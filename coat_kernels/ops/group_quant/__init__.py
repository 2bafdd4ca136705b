"""Group quantize and dequantize: `coat_kernels::quantize_group`, `coat_kernels::dequantize_group` and their public wrappers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...backends import require_backend
from ...formats import FORMATS, check_group_size, check_rounding, codec_name, get_codec, num_groups
from ...formats.codecs import STREAM_EXP_AVG, Codec
from ...formats.parameters import PARAM_DTYPES
from ...formats.random import stream_key
from .._library import LIBRARY
from . import cpu, reference

LIBRARY.define(
    "quantize_group(Tensor x, str codec, int group_size=128, bool signed=True, str rounding='nearest', int key=0)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "dequantize_group(Tensor codes, Tensor amax, Tensor k16, str codec, int group_size=128, ScalarType dtype=float, *, "
    "SymInt[]? shape=None) -> Tensor"
)


@dataclass(frozen=True)
class GroupQuantized:
    """A tensor as codes with group metadata; byte layout: `coat_kernels/formats/README.md`.

    Args:
        codes: uint8, shape of the tensor; "e2m1", whose codes share bytes: flat, ceil(n / 2).
        amax: float32 [n_groups], the largest finite magnitude of each group.
        k16: uint8 [n_groups], 16·k of the expansion (`log8`: its step j).
        fmt: "e4m3", "e5m2", "log8", "softsign8" or "e2m1".
        group_size: elements a group.
        expand: whether dynamic range expansion was used.
        shape: of the tensor.
    """

    codes: Tensor
    amax: Tensor
    k16: Tensor
    fmt: str
    group_size: int
    expand: bool
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.amax.nbytes + self.k16.nbytes


def check_quantize_group(x: Tensor, codec: str, group_size: int, signed: bool, rounding: str) -> Codec:
    """The checks that the op and its fake share; returns the codec."""
    chosen = get_codec(codec)
    if not chosen.quantized:
        raise ValueError(f"codec {codec!r} stores values as they are: there is nothing to quantize; use {', '.join(FORMATS)}")
    if chosen.blockwise:
        raise ValueError(f"codec {codec!r} scales blocks, not groups: call quantize_blockwise, or use e4m3, e5m2 or log8 here")
    check_group_size(group_size)
    check_rounding(rounding)
    if x.dtype not in PARAM_DTYPES:
        raise TypeError(f"cannot quantize dtype {x.dtype}; pass float32, bfloat16 or float16 (x.float() converts)")
    if signed and not chosen.signed:
        raise ValueError(f"codec {codec!r} holds no signs; pass signed=False and non-negative values, or use e4m3 or e5m2")
    return chosen


def check_dequantize_group(
    codes: Tensor, amax: Tensor, k16: Tensor, codec: str, group_size: int, dtype: torch.dtype, shape: Sequence[int] | None
) -> tuple[Codec, torch.Size]:
    """The checks that the op and its fake share; returns the codec and the shape of the result."""
    chosen = get_codec(codec)
    if not chosen.quantized:
        raise ValueError(f"codec {codec!r} has no codes to decode; use {', '.join(FORMATS)}")
    if chosen.blockwise:
        raise ValueError(f"codec {codec!r} scales blocks, not groups: call dequantize_blockwise")
    check_group_size(group_size)
    if dtype not in PARAM_DTYPES:
        raise TypeError(f"cannot dequantize to {dtype}; choose float32, bfloat16 or float16")
    default = codes.shape if chosen.bits == 8 else torch.Size([2 * codes.numel()])
    out = default if shape is None else torch.Size(shape)
    if math.prod(chosen.codes_shape(out)) != codes.numel():
        raise ValueError(f"a tensor of shape {tuple(out)} has {math.prod(chosen.codes_shape(out))} bytes of codes, got {codes.numel()}")
    groups = num_groups(out.numel(), group_size)
    for name, tensor, want in (("codes", codes, torch.uint8), ("amax", amax, torch.float32), ("k16", k16, torch.uint8)):
        if tensor.dtype != want:
            raise TypeError(f"{name} must be {want}, got {tensor.dtype}")
        if tensor.device != codes.device:
            raise ValueError(f"{name} is on {tensor.device} and codes on {codes.device}; move them to one device")
    for name, tensor in (("amax", amax), ("k16", k16)):
        if tensor.shape != (groups,):
            raise ValueError(f"{name} must have one entry a group, shape ({groups},) for {out.numel()} codes, got {tuple(tensor.shape)}")
    return chosen, out


def _backend(x: Tensor) -> Any:
    chosen = require_backend("group_quant", x.device)
    if chosen == "Triton":
        return import_module(".triton", __package__)
    return cpu if chosen == "C++" else reference


def _quantize_group(
    x: Tensor, codec: str, group_size: int = 128, signed: bool = True, rounding: str = "nearest", key: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = check_quantize_group(x, codec, group_size, signed, rounding)
    return _backend(x).quantize_group(x.contiguous(), codec=chosen, group_size=group_size, signed=signed, rounding=rounding, key=key)


def _dequantize_group(
    codes: Tensor,
    amax: Tensor,
    k16: Tensor,
    codec: str,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
    *,
    shape: Sequence[int] | None = None,
) -> Tensor:
    chosen, out = check_dequantize_group(codes, amax, k16, codec, group_size, dtype, shape)
    return _backend(codes).dequantize_group(
        codes.contiguous(), amax.contiguous(), k16.contiguous(), codec=chosen, group_size=group_size, dtype=dtype, shape=out
    )


def _quantize_group_fake(
    x: Tensor, codec: str, group_size: int = 128, signed: bool = True, rounding: str = "nearest", key: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = check_quantize_group(x, codec, group_size, signed, rounding)
    groups = num_groups(x.numel(), group_size)
    codes = torch.empty(chosen.codes_shape(x.shape), dtype=torch.uint8, device=x.device)
    return codes, x.new_empty(groups, dtype=torch.float32), x.new_empty(groups, dtype=torch.uint8)


def _dequantize_group_fake(
    codes: Tensor,
    amax: Tensor,
    k16: Tensor,
    codec: str,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
    *,
    shape: Sequence[int] | None = None,
) -> Tensor:
    _, out = check_dequantize_group(codes, amax, k16, codec, group_size, dtype, shape)
    return torch.empty(out, dtype=dtype, device=codes.device)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("quantize_group", _quantize_group, _key)
    LIBRARY.impl("dequantize_group", _dequantize_group, _key)
torch.library.register_fake("coat_kernels::quantize_group", _quantize_group_fake, lib=LIBRARY)
torch.library.register_fake("coat_kernels::dequantize_group", _dequantize_group_fake, lib=LIBRARY)


def quantize_group(
    x: Tensor,
    fmt: str = "e4m3",
    group_size: int = 128,
    expand: bool = True,
    *,
    signed: bool | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> GroupQuantized:
    """Quantize a tensor to one byte an element ("e2m1": half a byte) in groups of consecutive elements.

    Args:
        x: float32, bfloat16 or float16, any shape and device; groups run over its row-major order.
        fmt: "e4m3", "e5m2", "softsign8", "e2m1" (4 bits), or "log8" for values that are never negative (checked, which waits for
            the device).
        group_size: 32, 64, 128 or 256.
        expand: dynamic range expansion, |x|^k per group (COAT, arXiv 2410.19313, section 3); `log8` and `softsign8` have none.
        signed: False for a second moment: then no non-zero value becomes zero, expanded or not. Default: True, for `log8` False.
        rounding: "nearest" (ties to even) or "stochastic" (unbiased: E[dequantize(quantize(x))] = x).
        seed: of stochastic rounding; ignored by "nearest".

    Returns:
        `GroupQuantized`; `dequantize_group` inverts it.

    Raises:
        ValueError: unknown format or rounding, a group size that is not offered, negative values for `log8`.
        TypeError: x is no float32, bfloat16 or float16 tensor.
        BackendUnavailable: no kernel for x's device.
    """
    codec = get_codec(codec_name(fmt, expand))
    if signed is None:
        signed = codec.signed
    if not codec.signed and x.numel() and (minimum := x.min().item()) < 0:
        raise ValueError(f"{fmt} holds non-negative values only, got a minimum of {minimum:g}; use fmt='e4m3' for signed data")
    key = stream_key(seed, 0, 0, STREAM_EXP_AVG)
    codes, amax, k16 = torch.ops.coat_kernels.quantize_group(x.detach(), codec.name, group_size, signed, rounding, key)
    return GroupQuantized(codes, amax, k16, fmt, group_size, codec.expand, x.shape)


def dequantize_group(q: GroupQuantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a `GroupQuantized` in its tensor's shape.

    Args:
        q: from `quantize_group`.
        dtype: float32, bfloat16 or float16.
    """
    codec = codec_name(q.fmt, q.expand)
    return torch.ops.coat_kernels.dequantize_group(q.codes, q.amax, q.k16, codec, q.group_size, dtype, shape=q.shape)
