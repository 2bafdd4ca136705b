"""What the backends of the gated residual are told beside tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ResidualSettings:
    """Format of the kept x, `formats/README.md`; "none": x itself."""

    fmt: str
    group_size: int
