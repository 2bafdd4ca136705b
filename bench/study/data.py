"""The text: Python's language reference as it ships with the interpreter, as bytes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

VALIDATION_SHARE = 0.1


def text() -> bytes:
    """All topics of `pydoc_data.topics` in the order of their names. Differs between Python versions: see `digest`."""
    from pydoc_data.topics import topics

    return "\n".join(f"{name}\n{topics[name]}" for name in sorted(topics)).encode()


def digest(data: bytes) -> str:
    """What a row names the text by."""
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def split(data: bytes) -> tuple[Tensor, Tensor]:
    """Training and validation bytes, int64. One cut: training windows never reach into the validation part."""
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int64)
    cut = int(values.numel() * (1 - VALIDATION_SHARE))
    return values[:cut], values[cut:]


def batch(values: Tensor, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows [size, length] and the bytes that follow each of theirs."""
    starts = torch.randint(values.numel() - length - 1, (size, 1), generator=generator)
    windows = values[starts + torch.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]


def validation_batches(values: Tensor, count: int, size: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """The same windows for every run."""
    generator = torch.Generator().manual_seed(1234)
    return [batch(values, size, length, generator) for _ in range(count)]
