"""How far a tensor is from another, as low-precision training is judged."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor


def sqnr(reference: Tensor | Iterable[Tensor], value: Tensor | Iterable[Tensor]) -> float:
    """Signal to quantization noise ratio in dB, over all tensors together."""
    pairs = [(reference, value)] if isinstance(reference, Tensor) else list(zip(reference, value, strict=True))
    signal = sum(float(a.detach().double().square().sum()) for a, _ in pairs)
    noise = sum(float((a.detach().double() - b.detach().double()).square().sum()) for a, b in pairs)
    return 10 * math.log10(signal / noise) if noise else math.inf
