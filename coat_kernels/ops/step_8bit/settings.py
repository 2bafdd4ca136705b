"""What one launch of the blockwise 8-bit step is told beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats import get_codec, num_groups
from ...formats.dynamic8 import check_block_size, zero_code
from ...formats.parameters import check_param_rounding
from ..state import Array, Moment, StepFormat

RULES = ("adamw", "lion", "momentum")
#: Of the pointer table: a contract with csrc/cpu/launch_blockwise.cpp and csrc/cuda.
COLUMNS = (
    *("param", "grad", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "residual"),
    *("step", "numel", "index"),
)


@dataclass(frozen=True)
class BlockwiseFormat(StepFormat):
    """How the tensors of one bucket are stored, and the rule that advances them.

    Args:
        rule: "adamw" (arXiv 1711.05101), "lion" (arXiv 2302.06675) or "momentum" (heavy ball, the first half of Muon).
        quantized: moments are dynamic8 codes; else float32 values.
        block_size: elements a block, 64 to 4096.
        param_rounding: "nearest", "stochastic" (16-bit parameters) or "split" (bfloat16 plus int8 residual).
        seed: of the generator behind stochastic rounding.

    Raises:
        ValueError: unknown rule or rounding, a block size that is not offered, param_rounding for "momentum", which stores no parameter.
    """

    rule: str
    quantized: bool = True
    block_size: int = 256
    param_rounding: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; choose one of {', '.join(map(repr, RULES))}")
        check_block_size(self.block_size)
        check_param_rounding(self.param_rounding)
        if self.rule == "momentum" and self.param_rounding != "nearest":
            raise ValueError(
                f"rule 'momentum' writes an update, no parameter: param_rounding {self.param_rounding!r} has no meaning; use 'nearest'"
            )

    @property
    def moments(self) -> tuple[Moment, ...]:
        codec = get_codec("dynamic8" if self.quantized else "float32")
        first = Moment("exp_avg", codec, self.block_size, signed=True)
        return (first, Moment("exp_avg_sq", codec, self.block_size, signed=False)) if self.rule == "adamw" else (first,)

    def arrays(self, shape: torch.Size) -> list[Array]:
        arrays = []
        for moment in self.moments:
            fill = zero_code(moment.signed) if self.quantized else 0
            arrays.append(Array(moment.name, moment.codec.array_dtype, tuple(shape), fill))
            if self.quantized:
                arrays.append(Array(f"{moment.name}_absmax", torch.float32, (num_groups(shape.numel(), self.block_size),)))
        if self.param_rounding == "split":
            arrays.append(Array("residual", torch.int8, tuple(shape)))
        return arrays


@dataclass(frozen=True)
class Hyperparameters8bit:
    """One step's numbers; `lr` may be a 0-dim tensor, which a GPU kernel reads on the device.

    "lion" does not read eps; "momentum" reads beta1, nesterov, maximize and grad_scale alone.
    """

    lr: float | Tensor
    beta1: float
    beta2: float = 0.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False
    nesterov: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
