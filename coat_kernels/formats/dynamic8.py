"""The blockwise dynamic 8-bit map: README.md, "Blockwise dynamic map". Tables, and encode and decode in plain PyTorch.

The map is that of bitsandbytes (arXiv 2110.02861), so that its codes and block maxima are read and written byte for byte.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .codecs import num_groups

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)

#: The encode table has one entry for each value of the upper 16 bits of |z|'s pattern from this one (under every boundary) to that of 1.0.
ENCODE_BASE, ENCODE_SIZE = 0x342D, 0x3F80 - 0x342D + 1
_DECADES = 7


def check_block_size(block_size: int) -> int:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size {block_size!r} is not offered; choose one of {', '.join(map(str, BLOCK_SIZES))}")
    return block_size


def zero_code(signed: bool) -> int:
    """The code of 0.0, which non-finite elements take too."""
    return 127 if signed else 0


@lru_cache
def magnitudes(signed: bool) -> Tensor:
    """float32 [129] or [256], ascending: 0, the means of 2^i (unsigned: 2^(i+1)) equal parts of [0.1, 1] · 10^(i-6), i = 0..6, and 1.

    Every operation is rounded to float32, the parts' borders once, which float64 gives without a second rounding.
    """
    values = [torch.zeros(1), torch.ones(1)]
    low, high = torch.tensor(0.1), torch.tensor(1.0)
    for decade in range(_DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        step = ((high - low) / parts).double()
        index = torch.arange(parts + 1, dtype=torch.float64)
        borders = torch.where(index < (parts + 1) // 2, low.double() + step * index, high.double() - step * (parts - index)).float()
        means = (borders[:-1] + borders[1:]) / 2
        values.insert(-1, means * torch.tensor(10.0 ** (decade - _DECADES + 1)))
    return torch.cat(values)


@lru_cache
def qmap(signed: bool) -> Tensor:
    """float32 [256], ascending: the number each code stands for, in units of its block's maximum. Treat as constant.

    Bit-equal to `bitsandbytes.functional.create_dynamic_map(signed)`. Signed: 127 negative values, 0, 128 positive ones; there is no -1.
    """
    values = magnitudes(signed)
    return torch.cat([-values[1:128].flip(0), values]) if signed else values


@lru_cache
def thresholds(signed: bool) -> Tensor:
    """float32 [len(magnitudes) - 1]: entry k is the smallest |z| whose nearest magnitude is k + 1.

    Nearest in exact arithmetic; a |z| halfway between two magnitudes goes to the one with the even code.
    """
    values = magnitudes(signed).double()
    middle = (values[:-1] + values[1:]) / 2  # exact: two float32 of neighbouring size
    first = middle.float()
    next_up = torch.nextafter(first, torch.tensor(torch.inf))
    upper_is_even = (torch.arange(1, len(values)) + zero_code(signed)) % 2 == 0
    enough = (first.double() > middle) | ((first.double() == middle) & upper_is_even)
    return torch.where(enough, first, next_up)


@lru_cache
def encode_table(signed: bool) -> Tensor:
    """int32 [ENCODE_SIZE]: `k = ((bits & 0xFFFF) + table[clamp((bits >> 16) - ENCODE_BASE, 0, ENCODE_SIZE - 1)]) >> 16`.

    `bits` is the pattern of |z| <= 1 and k the index of its magnitude. A value of the upper 16 bits spans one threshold at most: the carry
    out of the lower 16 compares with it.
    """
    bits = thresholds(signed).view(torch.int32)
    bucket = torch.arange(ENCODE_SIZE, dtype=torch.int32) + ENCODE_BASE
    below = torch.searchsorted(bits, bucket << 16, right=True)
    inside = torch.searchsorted(bits, (bucket + 1) << 16, right=False) - below
    carry = torch.where(inside > 0, 0x10000 - (bits[below.clamp(max=len(bits) - 1)] & 0xFFFF), 0)
    return ((below << 16) + carry).to(torch.int32)


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """Flat `x` as [n_blocks, block_size], the last block padded with zeros."""
    n_blocks = num_groups(x.numel(), block_size)
    padded = x.new_zeros(n_blocks * block_size)
    padded[: x.numel()] = x.reshape(-1)
    return padded.view(n_blocks, block_size)


def encode_blocks(x: Tensor, block_size: int, *, signed: bool, keep_nonzero: bool = False) -> tuple[Tensor, Tensor]:
    """Codes uint8 of x's shape and absmax float32 [n_blocks].

    Args:
        x: any shape, read as float32 in row-major order.
        block_size: elements a block.
        signed: which map; without signs negative values take code 0.
        keep_nonzero: positive values take at least code 1 (unsigned only): what the second moment of a step asks for.
    """
    blocks = _blocks(x.to(torch.float32), block_size)
    finite = torch.where(torch.isfinite(blocks), blocks, 0)
    absmax = finite.abs().amax(dim=1) if blocks.numel() else blocks.new_zeros(0)
    z = torch.where(absmax[:, None] > 0, finite / absmax[:, None], 0)
    codes = encode(z, signed)
    if keep_nonzero:
        codes = torch.where((finite > 0) & (codes == 0), 1, codes)
    return codes.to(torch.uint8).reshape(-1)[: x.numel()].view(x.shape), absmax


def encode(z: Tensor, signed: bool) -> Tensor:
    """int64 codes of float32 z in [-1, 1]."""
    magnitude = z.abs() if signed else z.clamp(min=0)
    k = torch.searchsorted(thresholds(signed).to(z.device), magnitude.contiguous(), right=True)
    return torch.where(z < 0, 127 - k.clamp(max=127), 127 + k) if signed else k


def decode_blocks(codes: Tensor, absmax: Tensor, block_size: int, *, signed: bool) -> Tensor:
    """float32 values of uint8 codes: qmap[code] · absmax."""
    values = qmap(signed).to(codes.device)[_blocks(codes, block_size).to(torch.int64)] * absmax[:, None]
    return values.reshape(-1)[: codes.numel()].view(codes.shape)
