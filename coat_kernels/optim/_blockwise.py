"""What the optimizers on bitsandbytes' dynamic map share: how a parameter's state is stored, and the way to bitsandbytes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..formats.dynamic8 import check_block_size
from ..ops.adamw_fp8 import storage_rounding
from ..ops.step_8bit import BlockwiseFormat, Step8bitBucket
from . import _bitsandbytes
from ._base import LowBitOptimizer


class BlockwiseOptimizer(LowBitOptimizer):
    """Base of optimizers whose moments are bitsandbytes' codes, with one float32 scale a block."""

    _settings: ClassVar[tuple[str, ...]] = ("block_size", "param_rounding", "min_quant_numel", "seed")
    _bucket_type = Step8bitBucket
    #: Of the fused step: "adamw", "lion" or "momentum".
    _rule: ClassVar[str]

    block_size: int
    param_rounding: str
    min_quant_numel: int
    seed: int

    def _set_block_size(self, block_size: int) -> None:
        self.block_size = check_block_size(block_size)

    def _state_format(self, param: Tensor, step: int = 0) -> BlockwiseFormat:
        return BlockwiseFormat(
            rule=self._rule,
            quantized=param.numel() >= self.min_quant_numel,
            block_size=self.block_size,
            param_rounding=storage_rounding(param.dtype, self.param_rounding),
            seed=self.seed,
        )

    def export_bitsandbytes_state_dict(self) -> dict[str, Any]:
        """The state as bitsandbytes' optimizer of the same rule loads it, byte for byte if `block_size` is 256.

        Other block sizes are encoded anew in blocks of 256, the only ones that bitsandbytes steps.
        """
        return _bitsandbytes.export(self)
