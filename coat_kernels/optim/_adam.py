"""What the AdamW classes share: torch.optim.AdamW's arguments, its checks, and the way back to its state dictionary."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats.parameters import check_param_rounding
from . import _state_dict
from ._base import LowBitOptimizer


class LowBitAdamW(LowBitOptimizer):
    """Base of `FP8AdamW` and `AdamW8bit`; arguments as documented there."""

    _family = "adamw"
    #: Of the fused step: what it is told of lr, betas and the rest.
    _hyper_type: ClassVar[Any]

    _settings: ClassVar[tuple[str, ...]] = ("param_rounding", "min_quant_numel", "seed")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        param_rounding: str,
        min_quant_numel: int,
        seed: int,
        maximize: bool,
        amsgrad: bool,
        foreach: bool | None,
        fused: bool | None,
        capturable: bool,
        differentiable: bool,
    ) -> None:
        check_lr(lr, foreach=foreach, capturable=capturable)
        check_betas(type(self).__name__, betas, 2, foreach=foreach, capturable=capturable)
        if not 0.0 <= eps:
            raise ValueError(f"Invalid epsilon value: {eps}; it must be 0 or more")
        check_weight_decay(weight_decay)
        self.param_rounding = check_param_rounding(param_rounding)
        self.min_quant_numel = check_min_quant_numel(min_quant_numel)
        self.seed = seed
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _hyperparameters(self, group: dict[str, Any], grads: list[Any]) -> Any:
        beta1, beta2 = group["betas"]
        return self._hyper_type(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )

    def export_adamw_state_dict(self) -> dict[str, Any]:
        """The state decoded to float32, as a dictionary that `torch.optim.AdamW.load_state_dict` reads.

        Residuals of param_rounding="split" stay behind: torch goes on from the 16-bit weights.
        """
        return _state_dict.export_adamw(self)


def check_lr(lr: float | Tensor, *, foreach: bool | None, capturable: bool) -> None:
    """torch.optim's checks of a learning rate, with its messages."""
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True; leave foreach at None")
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}; it must be 0 or more")


def check_betas(name: str, betas: Any, count: int, *, foreach: bool | None = None, capturable: bool = False) -> None:
    """`count` decay rates in [0, 1), floats: with torch's messages where it has one."""
    if not isinstance(betas, (tuple, list)) or len(betas) != count:
        raise ValueError(f"betas must be {count} numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}; it must be in [0, 1)")
    tensors = [isinstance(beta, torch.Tensor) for beta in betas]
    if any(tensors) and not all(tensors):
        raise ValueError(f"betas must be either both floats or both Tensors, got {betas!r}")
    if any(tensors):
        where = "capturable=False and foreach=True" if foreach and not capturable else name
        raise ValueError(f"betas[0] as a Tensor is not supported for {where}: the kernels take betas as numbers; pass floats")


def check_eps(eps: Any, count: int) -> None:
    """`count` numbers of 0 or more: optimizers with several constants take them together."""
    if not isinstance(eps, (tuple, list)) or len(eps) != count or not all(x >= 0 for x in eps):
        raise ValueError(f"eps must be a tuple of {count} numbers of 0 or more, got {eps!r}")


def check_weight_decay(weight_decay: float) -> None:
    if not 0.0 <= weight_decay:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; it must be 0 or more")


def check_min_quant_numel(value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"min_quant_numel must be an integer of 0 or more, got {value!r}")
    return value
