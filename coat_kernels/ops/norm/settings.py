"""What the backends of the norms are told beside tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormSettings:
    """What the passes of a norm share.

    Args:
        plus_one: gain counts from one.
        fmt, group_size: of the kept xhat, `formats/README.md`.
        center: whether the mean is subtracted; nothing to a pass that starts from xhat and needs no gradient.
    """

    plus_one: bool
    fmt: str
    group_size: int
    center: bool = False


@dataclass(frozen=True)
class NormGradients:
    """What a backward pass is asked for: the sums of dgain and dshift over `segments` equal runs of rows, and dx."""

    segments: int
    gain: bool
    shift: bool
    x: bool
