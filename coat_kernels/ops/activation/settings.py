"""What an activation function's op is told beside its tensors, as every backend takes it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...formats.scaled8 import check_format, check_group
from .kinds import KINDS

#: What was saved of a tensor: codes and scale; with `fmt` "none" the values and an empty tensor.
Saved = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ActivationSettings:
    """The function and the format of its 8-bit copy.

    Args:
        kind: one of `KINDS`.
        fmt: "none" or a scaled 8-bit format.
        group_size: elements that share a scale.

    Raises:
        ValueError: a kind, a format or a group size that is not offered.
    """

    kind: str
    fmt: str
    group_size: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown activation {self.kind!r}; choose one of {', '.join(KINDS)}")
        check_format(self.fmt, allow_none=True)
        check_group(self.group_size)
