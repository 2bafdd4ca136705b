"""The counter-based generator of stochastic rounding (README.md, "Stochastic rounding"), on PyTorch tensors.

uint32 arithmetic is done in int64 with a mask, so it runs on every device torch has.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _mix(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = _mul(h, 0x85EBCA6B)
    h = h ^ (h >> 13)
    h = _mul(h, 0xC2B2AE35)
    return h ^ (h >> 16)


def _mul(h: Tensor, constant: int) -> Tensor:
    # int64 would overflow at 2^32 · 2^32: multiply by halves of the constant.
    low, high = constant & 0xFFFF, constant >> 16
    return (h * low + ((h * high & 0xFFFF) << 16)) & _MASK


def stream_key(seed: int, step: int, tensor_index: int, stream: int) -> int:
    """uint32 key of one tensor's stream at one step."""
    h = _mix(torch.tensor(seed & _MASK))
    h = _mix((h + step) & _MASK)
    return int(_mix((h + 4 * tensor_index + stream) & _MASK))


def _words(key: int, counter: Tensor) -> Tensor:
    return _mix((key + _mul(counter & _MASK, _GOLDEN)) & _MASK)


def uniform8(key: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 [numel] in (0, 1), one of 256 values: the dither of the moments' codes."""
    i = torch.arange(numel, device=device)
    byte = (_words(key, i >> 2) >> ((i & 3) * 8)) & 0xFF
    return (byte.to(torch.float32) + 0.5) / 256


def half_words(key: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [numel] of uniform 16-bit numbers: what decides how a parameter is rounded."""
    i = torch.arange(numel, device=device)
    return (_words(key, i >> 1) >> ((i & 1) * 16)) & 0xFFFF
