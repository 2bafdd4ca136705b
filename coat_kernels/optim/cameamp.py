"""`Automagic_CameAMP_Improved_8Bit`: CAME with a learning rate of its own for each element, and penalties for LoRA training."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.came_8bit import CameFormat, CameSettings
from ..ops.came_8bit.magnitudes import grad_l1
from ..ops.came_8bit.settings import RANK_HEAD, RANK_MAX_SIDE, has_edges, matrix_sides, phase_of, tail_side
from ._adam import check_lr
from ._plan import local
from ._states import allocate
from .came_8bit import CameOptimizer
from .cameamp_config import GROUP_FIELDS, STRUCTURAL, Improved8BitOptimizerConfig, check_numbers

_log = logging.getLogger("coat_kernels.optim")


class Automagic_CameAMP_Improved_8Bit(CameOptimizer):
    """Factored moments (CAME), momentum damped where it disagrees with the gradient, and a learning rate for every element.

    Formulas and sources: `coat_kernels/ops/came_8bit/reference.py`. The warm-up of W = `warmup_steps` steps has two halves: up to W/2
    momentum is weighed by a torque and the update takes the gradient's signs; afterwards updates against the gradient are masked. Up
    to W each element's learning rate moves by `lr_bump` as the gradient keeps or changes its sign; then it stays in
    proportion to the group's lr, which a scheduler may move at any time.

    An element's gradient is damped by its share of the group's sum of magnitudes (AGR): one that is the whole of its group's gradient does
    not move. `step_parameter` and sharded parameters take the sum over what is at hand.

    A parameter of shape [n, ...] is a matrix of n rows. Vectors, and parameters that FSDP or ZeRO flattened, have none of the
    features that need rows and columns; `get_memory_efficiency_report()` names what is off. States of LoRA factors of rank 16 take at
    most 4.8 bytes an element in the first half of the warm-up, 2.8 in the second and 2.6 after it; AdamW's take 8.

    Args:
        params: parameters, named parameters or param groups: float32, bfloat16 or float16 tensors of any layout. A group may hold
            any field that `Improved8BitOptimizerConfig` marks (group).
        lr: learning rate, a float or a 1-element tensor.
        profile: "memory_optimized", "quality_optimized", "balanced" or None: see `cameamp_config.PROFILES`. It never sets lr.
        min_lr ... fused_adam: fields of `Improved8BitOptimizerConfig`, explained there. None takes the profile's value, or the default.
        block_size: elements of the momentum that share one scale: 64 to 4096.
        param_rounding: how an updated 16-bit parameter is stored: "nearest" or "stochastic".
        seed: of stochastic rounding.
        maximize: ascend instead of descend.
        foreach, fused: None, or True, runs the fused kernels; False for both, or fused=False, the PyTorch reference.
        capturable, differentiable: not supported; True raises.

    Raises:
        TypeError: a misspelt option; names the nearest.
        ValueError: an unknown profile, a number out of range, an option that is not offered.
    """

    _family = "cameamp"
    _settings: ClassVar[tuple[str, ...]] = (*CameOptimizer._settings, "config")
    #: The profile of the classes that stand for one.
    _profile: ClassVar[str | None] = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        *,
        profile: str | None = None,
        min_lr: float | None = None,
        max_lr: float | None = None,
        lr_bump: float | None = None,
        eps: tuple[float, float, float] | None = None,
        clip_threshold: float | None = None,
        betas: tuple[float, float, float] | None = None,
        eta: float | None = None,
        beta1_decay: float | None = None,
        weight_decay: float | None = None,
        warmup_steps: int | None = None,
        edge_threshold: float | None = None,
        adaptation_rate: float | None = None,
        came: bool | None = None,
        full_finetune: bool | None = None,
        verbose: bool | None = None,
        edge_suppression: bool | None = None,
        edge_penalty: float | None = None,
        background_regularization: bool | None = None,
        spatial_awareness: bool | None = None,
        frequency_penalty: float | None = None,
        detail_preservation: float | None = None,
        lora_rank_penalty: bool | None = None,
        rank_penalty_strength: float | None = None,
        low_rank_emphasis: float | None = None,
        optim_bits: int | None = None,
        percentile_clipping: int | None = None,
        block_wise: bool | None = None,
        min_8bit_size: int | None = None,
        stable_emb: bool | None = None,
        fused_adam: bool | None = None,
        force_8bit: bool | None = None,
        block_size: int = 256,
        param_rounding: str = "nearest",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        arguments = locals()
        names = [field.name for field in fields(Improved8BitOptimizerConfig)]
        given = {name: arguments[name] for name in names if arguments[name] is not None}
        if self._profile is not None and given.setdefault("profile", self._profile) != self._profile:
            raise ValueError(f"{type(self).__name__} is the profile {self._profile!r}; for {profile!r} take AutomagicCameAMP")
        check_lr(lr, foreach=foreach, capturable=capturable)
        self.config = Improved8BitOptimizerConfig(**given)
        self._set_storage(block_size, param_rounding, seed)
        switches = {name: arguments[name] for name in ("maximize", "foreach", "fused", "capturable", "differentiable")}
        super().__init__(params, {**{name: getattr(self.config, name) for name in GROUP_FIELDS}, **switches})
        if self.config.verbose:
            _log.info("%s: %s", type(self).__name__, ", ".join(f"{k}={v!r}" for k, v in asdict(self.config).items()))

    def _check_group(self, group: dict[str, Any]) -> None:
        fixed = [name for name in STRUCTURAL if name in group]
        if fixed:
            raise ValueError(
                f"{', '.join(fixed)} cannot differ between param groups, as what is stored follows from it; pass it to the constructor"
            )
        check_lr(group["lr"], foreach=group["foreach"], capturable=False)
        check_numbers(group)
        lr, low, high = float(group["lr"]), group["min_lr"], group["max_lr"]
        if lr > high:
            _log.warning("lr %g lies above max_lr %g, which bounds every element's learning rate: raise max_lr", lr, high)
        elif 0 < lr < low:
            _log.warning("lr %g lies below min_lr %g, which bounds every element's learning rate: lower min_lr", lr, low)
        super()._check_group(group)

    # ---- what is stored

    def _state_format(self, param: Tensor, step: int = 0) -> CameFormat:
        config = self.config
        return CameFormat(
            rule="cameamp",
            phase=phase_of(step + 1, config.warmup_steps),
            use_8bit=config.optim_bits == 8 and (config.force_8bit or param.numel() >= config.min_8bit_size),
            came=config.came,
            edge_suppression=config.edge_suppression,
            spatial_awareness=config.spatial_awareness,
            lora_rank_penalty=config.lora_rank_penalty,
            **self._storage(param),
        )

    def _step_count(self, param: Tensor) -> int:
        step = self.state[param].get("step") if param in self.state else None
        return 0 if step is None else int(step)

    def _run(self, key: Any, group: dict[str, Any], params: list[Tensor]) -> None:
        super()._run(key, group, params)
        warm_up = {i for launch in self._plans[key].launches if launch.bucket.fmt.phase != "late" for i in launch.positions}
        if warm_up:
            self._end_phases([params[i] for i in warm_up])

    def _end_phases(self, params: Sequence[Tensor]) -> None:
        """Free the states of a phase whose last step was just made, by moving the others to a new arena."""
        last_steps = {(self.config.warmup_steps - 1) // 2, self.config.warmup_steps - 1}
        counts = torch.stack([self.state[param]["step"] for param in params]).tolist()
        moved: dict[Any, list[Tensor]] = defaultdict(list)
        for param, count in zip(params, counts, strict=True):
            if count in last_steps:
                fmt = self._state_format(param, int(count))
                if self.state[param].keys() - {"step"} != {array.name for array in fmt.arrays(local(param).shape)}:
                    moved[fmt, local(param).device].append(param)
        for (fmt, device), members in moved.items():
            for param, state in zip(members, allocate([local(p).shape for p in members], fmt, device), strict=True):
                for name, value in state.items():
                    value.copy_(self.state[param][name])
                self.state[param] = state
        if moved:
            self._plans.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, in any phase of the warm-up; training goes on as if it had not stopped.

        Momentum of another block size or bit width is converted, with a `CoatWarning`.

        Raises:
            ValueError: a dictionary of another optimizer, of other features or another phase, or truncated.
        """
        super().load_state_dict(state_dict)

    # ---- the step's numbers

    def _hyperparameters(self, group: dict[str, Any], grads: list[Any]) -> CameSettings:
        numbers = ("min_lr", "max_lr", "lr_bump", "eps", "beta1_decay", "adaptation_rate", "edge_threshold", "edge_penalty")
        shaping = ("frequency_penalty", "rank_penalty_strength", "low_rank_emphasis", "detail_preservation", "background_regularization")
        return CameSettings(
            grad_l1=grad_l1([local(grad) for grad in grads if grad is not None], getattr(self, "grad_scale", None)),
            eta=None if group["full_finetune"] else group["eta"],
            **{name: group[name] for name in (*numbers, *shaping)},
            **self._common(group),
        )

    # ---- report

    def get_memory_efficiency_report(self) -> dict[str, Any]:
        """What the states take now: the base report, and

        `total_parameters`, `8bit_parameters`, `32bit_parameters` (elements with state), `compression_ratio` (8-bit elements in total),
        `memory_saved_mb` (against the 8 bytes an element of float32 AdamW), `states_breakdown` (bytes of each state) and
        `features_off`: feature -> reason and number of tensors and elements without it.
        """
        report = super().get_memory_efficiency_report()
        breakdown: dict[str, int] = defaultdict(int)
        for state in self.state.values():
            for name, value in state.items():
                if name != "step":
                    breakdown[name] += value.nbytes
        total, quantized = report["parameters"], report["quantized_parameters"]
        return {
            **report,
            "total_parameters": total,
            "8bit_parameters": quantized,
            "32bit_parameters": total - quantized,
            "compression_ratio": quantized / total if total else 0.0,
            "memory_saved_mb": (report["adamw_float32_bytes"] - report["state_bytes"]) / 2**20,
            "states_breakdown": dict(breakdown),
            "features_off": self._features_off(),
        }

    def _features_off(self) -> dict[str, dict[str, Any]]:
        config = self.config
        vector = "parameters with fewer than two dimensions, flattened ones too, have no rows and columns"
        small = "needs more than 2 rows and more than 2 columns"
        sides = f"needs a shorter side of {RANK_HEAD + 1} to {RANK_MAX_SIDE}"
        found: dict[str, dict[str, Any]] = {}
        for group in self.param_groups:
            wanted = (
                ("factored_moments", True, matrix_sides, vector),
                ("row_scaling", not group["full_finetune"], matrix_sides, vector),
                ("spatial_awareness", config.spatial_awareness, matrix_sides, vector),
                ("background_regularization", group["background_regularization"], matrix_sides, vector),
                ("edge_suppression", config.edge_suppression, has_edges, small),
                ("frequency_penalty", group["frequency_penalty"] > 0, has_edges, small),
                ("lora_rank_penalty", config.lora_rank_penalty, tail_side, sides),
            )
            shapes = [local(param).shape for param in group["params"]]
            for name, asked, serves, reason in wanted:
                without = [shape.numel() for shape in shapes if shape.numel() and not serves(shape)]
                if asked and without:
                    entry = found.setdefault(name, {"reason": reason, "tensors": 0, "parameters": 0})
                    entry["tensors"] += len(without)
                    entry["parameters"] += sum(without)
        return found


#: PEP 8 name; trainers that send every name ending in 8bit to bitsandbytes take it too.
AutomagicCameAMP = Automagic_CameAMP_Improved_8Bit


class CameAMPMemoryOptimized(Automagic_CameAMP_Improved_8Bit):
    """`Automagic_CameAMP_Improved_8Bit` with the profile "memory_optimized"."""

    _profile = "memory_optimized"


class CameAMPQualityOptimized(Automagic_CameAMP_Improved_8Bit):
    """`Automagic_CameAMP_Improved_8Bit` with the profile "quality_optimized"."""

    _profile = "quality_optimized"


class CameAMPBalanced(Automagic_CameAMP_Improved_8Bit):
    """`Automagic_CameAMP_Improved_8Bit` with the profile "balanced"."""

    _profile = "balanced"


def create_improved_8bit_optimizer(params: Any, profile: str | None = None, **kwargs: Any) -> Automagic_CameAMP_Improved_8Bit:
    """`Automagic_CameAMP_Improved_8Bit(params, profile=profile, **kwargs)`."""
    return Automagic_CameAMP_Improved_8Bit(params, profile=profile, **kwargs)
