"""CAME with its momentum in 8 bits and both other states factored."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..formats.dynamic8 import check_block_size
from ..ops.adamw_fp8 import storage_rounding
from ..ops.came_8bit import CameBucket, CameFormat, CameSettings
from ._adam import check_betas, check_eps, check_lr, check_min_quant_numel, check_weight_decay
from ._base import LowBitOptimizer


class CameOptimizer(LowBitOptimizer):
    """What the optimizers on the CAME step share."""

    _settings: ClassVar[tuple[str, ...]] = ("block_size", "param_rounding", "seed")
    _bucket_type = CameBucket

    block_size: int
    param_rounding: str
    seed: int

    def _set_storage(self, block_size: int, param_rounding: str, seed: int) -> None:
        if param_rounding not in ("nearest", "stochastic"):
            raise ValueError(f"unknown param_rounding {param_rounding!r}; {type(self).__name__} offers 'nearest' and 'stochastic'")
        self.block_size, self.param_rounding, self.seed = check_block_size(block_size), param_rounding, seed

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        if group.get("capturable"):
            raise ValueError(f"{name} does not support capturable=True: its step counts live in host memory; leave it at False")
        check_betas(name, group["betas"], 3)
        check_weight_decay(group["weight_decay"])
        super()._check_group(group)

    def _storage(self, param: Tensor) -> dict[str, Any]:
        """Fields of `CameFormat` that do not depend on the rule."""
        rounding = storage_rounding(param.dtype, self.param_rounding)
        return {"block_size": self.block_size, "param_rounding": rounding, "seed": self.seed}

    def _common(self, group: dict[str, Any]) -> dict[str, Any]:
        """Fields of `CameSettings` that both rules have."""
        names = ("lr", "betas", "clip_threshold", "weight_decay", "maximize")
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        return {**{name: group[name] for name in names}, **scaling}


class CAME8bit(CameOptimizer):
    r"""CAME (arXiv 2307.02047): Adafactor's factored second moment, and an update divided by its own factored instability.

    .. math::
        h = g / \sqrt{v}, \quad h \leftarrow h / \max(1, \text{rms}(h) / d), \quad m \leftarrow \beta_1 m + (1 - \beta_1) h, \quad
        p \leftarrow p - \text{lr}\,(m / \sqrt{r} + \lambda p)

    v and r are moving averages (beta2, beta3) of g² + eps1 and (h - m)² + eps2, each kept as its row and column means. A parameter of
    shape [n, ...] is a matrix of n rows; vectors keep v whole and have no r. m is stored as bitsandbytes' signed 8-bit map: 1.5 bytes
    a parameter at LoRA rank 16, 1.02 for large matrices (AdamW: 8).

    Args:
        params: parameters, named parameters or param groups: float32, bfloat16 or float16 tensors of any layout.
        lr: learning rate, a float or a 1-element tensor.
        betas: decay rates of m, v and r.
        eps: eps1 and eps2.
        clip_threshold: d, the largest root mean square of h.
        weight_decay: λ, decoupled.
        block_size: elements that share one scale of m: 64 to 4096.
        min_quant_numel: tensors with fewer elements keep m in float32.
        param_rounding: how an updated 16-bit parameter is stored: "nearest" or "stochastic".
        seed: of stochastic rounding.
        maximize: ascend instead of descend.
        foreach, fused: None, or True, runs the fused kernels; False for both, or fused=False, the PyTorch reference.
        capturable, differentiable: not supported; True raises.

    Raises:
        ValueError, TypeError, RuntimeError: at construction or at the first step, for what is not supported.
    """

    _family = "came"
    _settings: ClassVar[tuple[str, ...]] = (*CameOptimizer._settings, "min_quant_numel")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        *,
        block_size: int = 256,
        min_quant_numel: int = 4096,
        param_rounding: str = "nearest",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_lr(lr, foreach=foreach, capturable=capturable)
        self.min_quant_numel = check_min_quant_numel(min_quant_numel)
        self._set_storage(block_size, param_rounding, seed)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_eps(group["eps"], 2)
        if not group["clip_threshold"] > 0:
            raise ValueError(f"Invalid clip_threshold value: {group['clip_threshold']}; it must be above 0")
        super()._check_group(group)

    def _state_format(self, param: Tensor, step: int = 0) -> CameFormat:
        return CameFormat(rule="came", use_8bit=param.numel() >= self.min_quant_numel, **self._storage(param))

    def _hyperparameters(self, group: dict[str, Any], grads: list[Any]) -> CameSettings:
        return CameSettings(eps=(*group["eps"], 0.0), **self._common(group))
