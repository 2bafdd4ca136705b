"""Lion with its momentum in bitsandbytes' dynamic 8-bit map."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..formats.parameters import check_param_rounding
from ..ops.step_8bit import Hyperparameters8bit
from ._adam import check_betas, check_lr, check_min_quant_numel, check_weight_decay
from ._blockwise import BlockwiseOptimizer


class Lion8bit(BlockwiseOptimizer):
    r"""Lion (arXiv 2302.06675) with one state byte a parameter, byte-compatible with `bitsandbytes.optim.Lion8bit`.

    .. math::
        p \leftarrow p\,(1 - \text{lr}\,\lambda) - \text{lr}\,\text{sign}(\beta_1 m + (1 - \beta_1) g), \qquad
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    Args:
        params, block_size, param_rounding, min_quant_numel, seed, maximize, foreach, fused, capturable, differentiable: as in `AdamW8bit`.
        lr: learning rate; a third to a tenth of AdamW's is usual.
        betas: of the update and of the momentum.
        weight_decay: decoupled; three to ten times AdamW's is usual.

    Raises:
        ValueError, TypeError, RuntimeError: at construction or at the first step, for what is not supported.
    """

    _family = _rule = "lion"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        block_size: int = 256,
        param_rounding: str = "nearest",
        min_quant_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_lr(lr, foreach=foreach, capturable=capturable)
        check_betas(type(self).__name__, betas, 2, foreach=foreach, capturable=capturable)
        check_weight_decay(weight_decay)
        self._set_block_size(block_size)
        self.param_rounding = check_param_rounding(param_rounding)
        self.min_quant_numel = check_min_quant_numel(min_quant_numel)
        self.seed = seed
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _hyperparameters(self, group: dict[str, Any], grads: list[Any]) -> Hyperparameters8bit:
        beta1, beta2 = group["betas"]
        return Hyperparameters8bit(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
