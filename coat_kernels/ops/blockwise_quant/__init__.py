"""Blockwise quantize and dequantize, dynamic 8-bit map: `coat_kernels::quantize_blockwise`, `coat_kernels::dequantize_blockwise`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...backends import require_backend
from ...formats import num_groups
from ...formats.dynamic8 import check_block_size
from ...formats.parameters import PARAM_DTYPES
from .._library import LIBRARY
from . import cpu, reference

LIBRARY.define("quantize_blockwise(Tensor x, int block_size=256, bool signed=True) -> (Tensor, Tensor)")
LIBRARY.define("dequantize_blockwise(Tensor codes, Tensor absmax, int block_size=256, bool signed=True, ScalarType dtype=float) -> Tensor")


@dataclass(frozen=True)
class BlockwiseQuantized:
    """A tensor as one-byte codes of the dynamic map; byte layout: `coat_kernels/formats/README.md`, "Blockwise dynamic map".

    Args:
        codes: uint8, shape of the tensor.
        absmax: float32 [n_blocks], the largest finite magnitude of each block.
        block_size: elements a block.
        signed: which of the two maps.
    """

    codes: Tensor
    absmax: Tensor
    block_size: int
    signed: bool

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes


def check_quantize_blockwise(x: Tensor, block_size: int) -> None:
    """The checks that the op and its fake share."""
    check_block_size(block_size)
    if x.dtype not in PARAM_DTYPES:
        raise TypeError(f"cannot quantize dtype {x.dtype}; pass float32, bfloat16 or float16 (x.float() converts)")


def check_dequantize_blockwise(codes: Tensor, absmax: Tensor, block_size: int, dtype: torch.dtype) -> None:
    """The checks that the op and its fake share."""
    check_block_size(block_size)
    if dtype not in PARAM_DTYPES:
        raise TypeError(f"cannot dequantize to {dtype}; choose float32, bfloat16 or float16")
    for name, tensor, want in (("codes", codes, torch.uint8), ("absmax", absmax, torch.float32)):
        if tensor.dtype != want:
            raise TypeError(f"{name} must be {want}, got {tensor.dtype}")
    if absmax.device != codes.device:
        raise ValueError(f"absmax is on {absmax.device} and codes on {codes.device}; move them to one device")
    blocks = num_groups(codes.numel(), block_size)
    if absmax.shape != (blocks,):
        raise ValueError(f"absmax must have one entry a block, shape ({blocks},) for {codes.numel()} codes, got {tuple(absmax.shape)}")


def _backend(x: Tensor) -> Any:
    chosen = require_backend("blockwise_quant", x.device)
    if chosen == "CUDA":
        return import_module(".cuda", __package__)
    return cpu if chosen == "C++" else reference


def _quantize_blockwise(x: Tensor, block_size: int = 256, signed: bool = True) -> tuple[Tensor, Tensor]:
    check_quantize_blockwise(x, block_size)
    return _backend(x).quantize_blockwise(x.contiguous(), block_size=block_size, signed=signed)


def _dequantize_blockwise(
    codes: Tensor, absmax: Tensor, block_size: int = 256, signed: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    check_dequantize_blockwise(codes, absmax, block_size, dtype)
    return _backend(codes).dequantize_blockwise(codes.contiguous(), absmax.contiguous(), block_size=block_size, signed=signed, dtype=dtype)


def _quantize_blockwise_fake(x: Tensor, block_size: int = 256, signed: bool = True) -> tuple[Tensor, Tensor]:
    check_quantize_blockwise(x, block_size)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    return codes, x.new_empty(num_groups(x.numel(), block_size), dtype=torch.float32)


def _dequantize_blockwise_fake(
    codes: Tensor, absmax: Tensor, block_size: int = 256, signed: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    check_dequantize_blockwise(codes, absmax, block_size, dtype)
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("quantize_blockwise", _quantize_blockwise, _key)
    LIBRARY.impl("dequantize_blockwise", _dequantize_blockwise, _key)
torch.library.register_fake("coat_kernels::quantize_blockwise", _quantize_blockwise_fake, lib=LIBRARY)
torch.library.register_fake("coat_kernels::dequantize_blockwise", _dequantize_blockwise_fake, lib=LIBRARY)


def quantize_blockwise(x: Tensor, block_size: int = 256, signed: bool = True) -> BlockwiseQuantized:
    """Quantize a tensor to one byte an element with bitsandbytes' dynamic map (arXiv 2110.02861), scaled by each block's largest magnitude.

    Codes and absmax are those that bitsandbytes reads and writes; where they may differ by rounding, `formats/README.md` says.

    Args:
        x: float32, bfloat16 or float16, any shape and device; blocks run over its row-major order.
        block_size: 64, 128, 256, 512, 1024, 2048 or 4096.
        signed: False for values that are never negative, at twice the resolution: negative ones become 0.

    Returns:
        `BlockwiseQuantized`; `dequantize_blockwise` inverts it.

    Raises:
        ValueError: a block size that is not offered.
        TypeError: x is no float32, bfloat16 or float16 tensor.
        BackendUnavailable: no kernel for x's device.
    """
    codes, absmax = torch.ops.coat_kernels.quantize_blockwise(x.detach(), block_size, signed)
    return BlockwiseQuantized(codes, absmax, block_size, signed)


def dequantize_blockwise(q: BlockwiseQuantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a `BlockwiseQuantized` in its tensor's shape.

    Args:
        q: from `quantize_blockwise`, or codes and absmax that bitsandbytes stored.
        dtype: float32, bfloat16 or float16.
    """
    return torch.ops.coat_kernels.dequantize_blockwise(q.codes, q.absmax, q.block_size, q.signed, dtype)
