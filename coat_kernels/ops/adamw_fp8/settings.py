"""What one launch of the fused AdamW step is told beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats import check_group_size, check_rounding, num_groups
from ...formats.codecs import Codec
from ...formats.parameters import check_param_rounding
from ..state import Array, Moment, StepFormat

#: Of the pointer table: a contract with csrc/cpu/launch.cpp and triton.py.
COLUMNS = ("param", "grad", "exp_avg", "exp_avg_sq", "amax", "k16", "residual", "step", "numel", "index")


@dataclass(frozen=True)
class StateFormat(StepFormat):
    """How the tensors of one bucket are stored.

    Args:
        exp_avg, exp_avg_sq: codecs of the moments.
        group_size: elements a group.
        exp_avg_rounding, exp_avg_sq_rounding: "nearest" or "stochastic".
        param_rounding: "nearest", "stochastic" (16-bit parameters) or "split" (bfloat16 plus int8 residual).
        seed: of the generator behind stochastic rounding.
    """

    exp_avg: Codec
    exp_avg_sq: Codec
    group_size: int = 128
    exp_avg_rounding: str = "nearest"
    exp_avg_sq_rounding: str = "nearest"
    param_rounding: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        check_rounding(self.exp_avg_rounding)
        check_rounding(self.exp_avg_sq_rounding)
        check_param_rounding(self.param_rounding)
        if not self.exp_avg.signed:
            raise ValueError(f"codec {self.exp_avg.name!r} holds no signs and cannot hold exp_avg; use e4m3_expand or softsign8")
        if not self.exp_avg_sq.holds_squares:
            raise ValueError(
                f"codec {self.exp_avg_sq.name!r} is too narrow for exp_avg_sq, whose range is squared; use e4m3_expand or log8"
            )
        for codec in (self.exp_avg, self.exp_avg_sq):
            if codec.blockwise:
                raise ValueError(
                    f"codec {codec.name!r} scales blocks, not groups: step_8bit_ takes it; use e4m3_expand, softsign8 or log8 here"
                )

    @property
    def moments(self) -> tuple[Moment, ...]:
        return (
            Moment("exp_avg", self.exp_avg, self.group_size, signed=True),
            Moment("exp_avg_sq", self.exp_avg_sq, self.group_size, signed=False),
        )

    def arrays(self, shape: torch.Size) -> list[Array]:
        arrays = [Array(m.name, m.codec.array_dtype, m.codec.codes_shape(tuple(shape))) for m in self.moments]
        if self.quantized:
            rows = (num_groups(shape.numel(), self.group_size), 2)
            for name, dtype, fill in (("amax", torch.float32, 0), ("k16", torch.uint8, 16)):
                columns = tuple(f"{m.name}_{name}" if m.codec.quantized else None for m in self.moments)
                arrays.append(Array(name, dtype, rows, fill, columns))
        if self.param_rounding == "split":
            arrays.append(Array("residual", torch.int8, tuple(shape)))
        return arrays


@dataclass(frozen=True)
class Hyperparameters:
    """AdamW's numbers for one step; `lr` may be a 0-dim tensor, which a GPU kernel reads on the device."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


def storage_rounding(dtype: torch.dtype, param_rounding: str) -> str:
    """The rounding that parameters of `dtype` take under the user's choice: float32 is stored exactly, whatever was chosen.

    Raises:
        TypeError: "split" asked of float16, which it cannot extend.
    """
    if param_rounding == "split" and dtype == torch.float16:
        raise TypeError("param_rounding='split' extends bfloat16 parameters, got torch.float16; use 'nearest' or 'stochastic'")
    return "nearest" if dtype == torch.float32 else param_rounding
