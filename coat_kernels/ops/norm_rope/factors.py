"""What heads are multiplied with and rotated by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadFactors:
    """The operands of `norm_rope` that its backward pass reads too.

    Args:
        weight, first_weight: float [dh]; the first `first_tokens` tokens of a sequence have the second, if there is one.
        cos, sin: float [T, dh] or [B, T, dh], both or none.
        interleaved: pairs are neighbours, else the halves of a head.
    """

    weight: Tensor
    first_weight: Tensor | None
    first_tokens: int
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool

    def each(self, change: Callable[[Tensor | None], Any]) -> HeadFactors:
        """With `change` applied to every tensor."""
        tables = change(self.cos), change(self.sin)
        return HeadFactors(change(self.weight), change(self.first_weight), self.first_tokens, *tables, self.interleaved)

    @property
    def table_tokens(self) -> int:
        """Rows of cos and sin; 1 where there are none."""
        return 1 if self.cos is None else max(self.cos.numel() // self.cos.shape[-1], 1)
