"""What one launch of the CAME step is told beside its tensors, and the host algebra behind each tensor's own numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...formats import get_codec
from ...formats.dynamic8 import check_block_size
from ...formats.parameters import check_param_rounding
from ..state import Array, Moment, StepFormat

RULES = ("came", "cameamp")
#: Steps t with t < W/2, t < W and the rest, W = warmup_steps; rule "came" is always "late".
PHASES = ("early", "middle", "late")

#: Singular directions up to this number are a LoRA factor's own: the rank penalty acts on those behind them.
RANK_HEAD = 10
#: Wider matrices are no LoRA factors: their tail would cost more than the step.
RANK_MAX_SIDE = 128
#: Steps between two refreshes of a matrix's `tail`.
TAIL_INTERVAL = 16
#: Largest value of `edge_history`; its code c stands for EDGE_MAX · (c/255)².
EDGE_MAX = 9.0
#: lr_mask code of the start value, and the codes on its shorter side.
MASK_CENTRE, MASK_SIDE = 128, 127

#: Streams of the generator in `formats/random.py`: stochastic rounding of `lr_mask` and `edge_history`. A tensor's streams 4 and 5 have
#: the keys of the next tensor's 0 and 1 (moments rounded by chance), which this op does not draw from.
STREAM_LR_MASK, STREAM_EDGE_HISTORY = 4, 5

#: Arrays between `grad` and `step` in the pointer table. A vector's full moments, `exp_avg_sq` and `res`, lie in the columns
#: `exp_avg_sq_col` and `res_col`; 0 stands for what a tensor does not have.
COLUMNS = (
    "exp_avg",
    "exp_avg_absmax",
    "torque",
    "lr_mask",
    "polarity",
    "edge_history",
    "row_variance",
    "exp_avg_sq_row",
    "exp_avg_sq_col",
    "res_row",
    "res_col",
    "tail",
    "lr_max",
)


def matrix_sides(shape: Sequence[int]) -> tuple[int, int] | None:
    """(rows, cols) of a parameter seen as a matrix [shape[0], the rest]; None for vectors, scalars and empty tensors."""
    if len(shape) < 2 or 0 in shape:
        return None
    return int(shape[0]), math.prod(shape[1:])


def has_edges(shape: Sequence[int]) -> bool:
    """Whether Laplacian and binomial filter are defined: a matrix with more than 2 rows and columns."""
    sides = matrix_sides(shape)
    return sides is not None and min(sides) > 2


def tail_side(shape: Sequence[int]) -> int:
    """Side of the `tail` of a matrix under the rank penalty; 0 for all others."""
    sides = matrix_sides(shape)
    return min(sides) if sides is not None and RANK_HEAD < min(sides) <= RANK_MAX_SIDE else 0


@dataclass(frozen=True)
class CameFormat(StepFormat):
    """How the tensors of one bucket are stored, which depends on their phase of the warm-up.

    Args:
        rule: "came" (arXiv 2307.02047) or "cameamp" (Automagic_CameAMP_Improved_8Bit).
        phase: one of `PHASES`; the states of a phase that is over are not kept.
        use_8bit: whether `exp_avg`, `torque`, `lr_mask` and `edge_history` are codes; False keeps them in float32.
        block_size: elements a block of `exp_avg`.
        came: rule "cameamp": divide the update by the root of its factored instability; False uses the momentum itself.
        edge_suppression, spatial_awareness, lora_rank_penalty: features of rule "cameamp" that keep state.
        param_rounding: "nearest", or "stochastic" for 16-bit parameters.
        seed: of the generator behind stochastic rounding.
    """

    rule: str = "cameamp"
    phase: str = "late"
    use_8bit: bool = True
    block_size: int = 256
    came: bool = True
    edge_suppression: bool = False
    spatial_awareness: bool = False
    lora_rank_penalty: bool = False
    param_rounding: str = "nearest"
    seed: int = 0

    steps_on_host: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rule not in RULES or self.phase not in PHASES:
            raise ValueError(f"rule is one of {RULES} and phase one of {PHASES}, got {self.rule!r} and {self.phase!r}")
        if self.rule == "came" and (self.phase != "late" or self.edge_suppression or self.spatial_awareness or self.lora_rank_penalty):
            raise ValueError("rule 'came' has no warm-up phases and no penalties; use rule 'cameamp'")
        check_block_size(self.block_size)
        check_param_rounding(self.param_rounding)
        if self.param_rounding == "split":
            raise ValueError("param_rounding='split' is not offered by the CAME step; choose 'nearest' or 'stochastic'")

    @property
    def moments(self) -> tuple[Moment, ...]:
        return (Moment("exp_avg", get_codec("dynamic8" if self.use_8bit else "float32"), self.block_size, True),)

    def arrays(self, shape: torch.Size) -> list[Array]:
        """Everything kept for a tensor of this shape; see the formats in `reference.py`."""
        whole, sides = tuple(shape), matrix_sides(shape)
        warm_up = self.rule == "cameamp" and self.phase != "late"
        early = warm_up and self.phase == "early"
        byte, signed = (torch.uint8, torch.int8) if self.use_8bit else (torch.float32, torch.float32)
        moment = self.moments[0]
        arrays = [Array(moment.name + suffix, dtype, dims) for suffix, (dtype, dims) in moment.parts(shape).items()]
        if self.rule == "cameamp":
            arrays += [Array("lr_mask", byte, whole), Array("lr_max", torch.float32, (1,))]
        if early:
            arrays.append(Array("torque", signed, whole))
        if early and self.edge_suppression and has_edges(shape):
            arrays.append(Array("edge_history", byte, whole))
        if warm_up:
            arrays.append(Array("polarity", torch.uint8, (-(-shape.numel() // 8),)))
        if warm_up and self.spatial_awareness and sides is not None:
            arrays.append(Array("row_variance", torch.bfloat16, (sides[0],)))
        names = ("exp_avg_sq", "res") if self.came and (self.rule == "cameamp" or sides is not None) else ("exp_avg_sq",)
        for name in names:
            if sides is None:
                arrays.append(Array(name, torch.float32, whole))
            else:
                arrays += [Array(f"{name}_row", torch.float32, sides[:1]), Array(f"{name}_col", torch.float32, sides[1:])]
        if self.lora_rank_penalty and tail_side(shape):
            arrays.append(Array("tail", torch.float32, (tail_side(shape),) * 2))
        return arrays


@dataclass(frozen=True)
class CameSettings:
    """One launch's numbers. Those below `grad_l1` belong to rule "cameamp"; a penalty of strength 0 is off.

    Args:
        lr: a float or a 0-dim tensor.
        betas: of momentum, second moment and instability.
        eps: added to g² and to (h - m)², and, rule "cameamp", to the sum of |g|.
        clip_threshold: largest RMS of the normalised gradient (and of the update, rule "cameamp").
        weight_decay: decoupled.
        maximize: ascend.
        grad_scale, found_inf: as `torch.amp.GradScaler` gives them.
        grad_l1: sum of |g| over the param group, g after division by grad_scale, a float or a 0-dim tensor; infinity switches that rule
            off for the step.
        min_lr, max_lr, lr_bump: bounds of the learning rate mask and what one agreement of signs moves it by.
        beta1_decay: beta1 of step t in the phases "middle" and "late" is max(beta1 · beta1_decay^t, 0.4).
        adaptation_rate: of the torque's moving average.
        edge_penalty, edge_threshold: strength of edge suppression, and what counts as an edge.
        frequency_penalty: share of the gradient's high-frequency part that is removed.
        rank_penalty_strength: of the tail directions added to the gradient, in units of its RMS.
        low_rank_emphasis: multiplies the torque of matrices under the rank penalty.
        detail_preservation: multiplies the row variance that scales lr_bump.
        background_regularization: halve the update of rows whose gradient hardly varies.
        eta: row scaling 1/sqrt(‖p_row‖ + 1/eta²), divided by eta so that a row of zeros has 1; None switches it off.
    """

    lr: float | Tensor
    betas: tuple[float, float, float]
    eps: tuple[float, float, float] = (1e-30, 1e-16, 1e-8)
    clip_threshold: float = 1.0
    weight_decay: float = 0.0
    maximize: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    grad_l1: float | Tensor = math.inf
    min_lr: float = 1e-7
    max_lr: float = 1e-3
    lr_bump: float = 3e-6
    beta1_decay: float = 0.9995
    adaptation_rate: float = 0.25
    edge_penalty: float = 0.0
    edge_threshold: float = 0.6
    frequency_penalty: float = 0.0
    rank_penalty_strength: float = 0.0
    low_rank_emphasis: float = 1.0
    detail_preservation: float = 1.0
    background_regularization: bool = False
    eta: float | None = None


def phase_of(step: int, warmup_steps: int) -> str:
    """Phase of the step that makes a tensor's count `step`, from 1."""
    return "early" if 2 * step < warmup_steps else "middle" if step < warmup_steps else "late"


#: Columns of `TensorNumbers.rows`.
NUMBERS = ("beta1", "bias_correction2", "bias_correction3", "lr_factor", "lr_raise", "lr_start", "old_table", "new_table")


@dataclass(frozen=True)
class TensorNumbers:
    """What a kernel needs of each tensor's own history; all of it is computed here and nowhere else.

    Args:
        rows: float32 [n_tensors, 8], columns `NUMBERS`. `lr_factor` multiplies the mask (rule "came": it is lr, and there is no mask).
            `lr_raise` is added to the mask before anything else. `old_table` and `new_table` are rows of `tables`: what the stored
            codes mean, and what the new ones will. At a tensor's first step `old_table` is -1: its mask is `lr_start`
            throughout, and neither polarity nor row variance have a past.
        tables: float32 [n_tables, 256], values of the mask's codes.
    """

    rows: Tensor
    tables: Tensor


def mask_table(start: float, settings: CameSettings) -> np.ndarray:
    """float32 [256]: values of lr_mask's codes, start · 2^((c - 128) · octaves); code 128 is `start`, the rest covers [min_lr, max_lr]."""
    octaves = max(math.log2(settings.max_lr / start), math.log2(start / settings.min_lr)) / MASK_SIDE
    values = start * np.exp2((np.arange(256) - MASK_CENTRE) * octaves)
    values[MASK_CENTRE] = start
    return values.astype(np.float32)


def tensor_numbers(steps: Sequence[int], lr_max: Tensor | None, settings: CameSettings, fmt: CameFormat) -> TensorNumbers:
    """The numbers of tensors whose counts reach `steps`.

    Args:
        steps: from 1.
        lr_max: float32 [n_tensors], the largest lr each tensor has seen in its warm-up; advanced in place. None for rule "came".
    """
    t = np.asarray(steps, dtype=np.float64)
    beta1, beta2, beta3 = settings.betas
    lr = np.float32(float(settings.lr))
    rows = np.zeros((len(t), len(NUMBERS)), dtype=np.float32)
    if fmt.rule == "came" or lr_max is None:
        rows[:, :4] = beta1, 1, 1, lr
        return TensorNumbers(torch.from_numpy(rows), torch.empty(0, 256))
    rows[:, 0] = beta1 if fmt.phase == "early" else np.maximum(beta1 * settings.beta1_decay**t, 0.4)
    rows[:, 1], rows[:, 2] = 1 - beta2**t, 1 - beta3**t
    old = lr_max.numpy().copy()
    first = t == 1
    # a schedule that starts at 0 must leave a mask to scale: what it means is at least min_lr
    start = np.maximum(lr, np.float32(settings.min_lr))
    new = np.where(first, start, np.maximum(old, lr) if fmt.phase != "late" else old).astype(np.float32)
    rows[:, 3] = np.divide(lr, new, out=np.zeros_like(new), where=new > 0)
    rows[:, 4] = np.where(first, 0, new - old)
    old_start, new_start = (np.clip(x, np.float32(settings.min_lr), np.float32(settings.max_lr)) for x in (old, new))
    rows[:, 5] = new_start
    starts, positions = np.unique(np.concatenate([old_start, new_start]), return_inverse=True)
    positions = positions.reshape(2, -1)
    rows[:, 6] = np.where(first, -1, positions[0])
    rows[:, 7] = positions[1]
    lr_max.copy_(torch.from_numpy(new))
    tables = np.stack([mask_table(float(start), settings) for start in starts])
    return TensorNumbers(torch.from_numpy(rows), torch.from_numpy(tables))
