"""AdamW with both moments in 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import FP8QuantizationConfig
from ..formats import get_codec
from ..formats.parameters import check_param_rounding
from ..ops.adamw_fp8 import Hyperparameters, StateFormat, storage_rounding
from ._base import LowBitOptimizer


class FP8AdamW(LowBitOptimizer):
    r"""`torch.optim.AdamW` with its two moments in one byte each and five bytes of metadata a group.

    .. math::
        p \leftarrow p\,(1 - \text{lr}\,\lambda) - \text{lr}\,\hat m / (\sqrt{\hat v} + \epsilon)

    The update uses the moments before they are encoded: the first step equals torch's, and no non-zero v becomes zero.
    Formats: COAT (arXiv 2410.19313), as defined in `coat_kernels/formats/README.md`.

    Args:
        params: parameters, named parameters or param groups: float32, bfloat16 or float16 tensors of any layout.
        lr: learning rate, a float or a 1-element tensor; a CUDA tensor is read on the device.
        betas: decay rates of the two moments, floats in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        fp8_config: formats of the moments; default `FP8QuantizationConfig()`: e4m3 with expansion, groups of 128.
        param_rounding: how an updated 16-bit parameter is stored. "nearest"; "stochastic", which does not lose updates under half a
            step; "split", bfloat16 with an int8 residual in the state, a 24-bit weight. float32 parameters are stored exactly.
        min_quant_numel: tensors with fewer elements (counted globally, not by shard) keep float32 moments.
        seed: of stochastic rounding.
        maximize: ascend instead of descend.
        amsgrad, differentiable: not supported; True raises.
        foreach, fused: None, or True, runs the fused kernels; False for both, or fused=False, the PyTorch reference.
        capturable: the step may be captured in a CUDA graph: lr, grad_scale and found_inf as CUDA tensors.

    Raises:
        ValueError, TypeError, RuntimeError: at construction or at the first step, for what is not supported.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        fp8_config: FP8QuantizationConfig | None = None,
        param_rounding: str = "nearest",
        min_quant_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        amsgrad: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        _check_numbers(lr, betas, eps, weight_decay, foreach=foreach, capturable=capturable)
        if fp8_config is not None and not isinstance(fp8_config, FP8QuantizationConfig):
            raise TypeError(f"fp8_config must be an FP8QuantizationConfig, got {type(fp8_config).__name__}")
        if not isinstance(min_quant_numel, int) or min_quant_numel < 0:
            raise ValueError(f"min_quant_numel must be an integer of 0 or more, got {min_quant_numel!r}")
        self.fp8_config = fp8_config or FP8QuantizationConfig()
        self.param_rounding = check_param_rounding(param_rounding)
        self.min_quant_numel = min_quant_numel
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

    def __getstate__(self) -> dict[str, Any]:
        own = ("fp8_config", "param_rounding", "min_quant_numel", "seed")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def _state_format(self, param: Tensor) -> StateFormat:
        config = self.fp8_config
        quantized = param.numel() >= self.min_quant_numel
        plain = get_codec("float32")
        return StateFormat(
            exp_avg=config.exp_avg_codec if quantized else plain,
            exp_avg_sq=config.exp_avg_sq_codec if quantized else plain,
            group_size=config.block_size,
            exp_avg_rounding=config.m1_rounding,
            exp_avg_sq_rounding=config.exp_avg_sq_rounding,
            param_rounding=storage_rounding(param.dtype, self.param_rounding),
            seed=self.seed,
        )

    def _hyperparameters(self, group: dict[str, Any]) -> Hyperparameters:
        beta1, beta2 = group["betas"]
        return Hyperparameters(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )


def _check_numbers(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, *, foreach: bool | None, capturable: bool
) -> None:
    """torch.optim.AdamW's checks, with its messages."""
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True; leave foreach at None")
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}; it must be 0 or more")
    if not 0.0 <= eps:
        raise ValueError(f"Invalid epsilon value: {eps}; it must be 0 or more")
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}; it must be in [0, 1)")
    tensors = [isinstance(beta, torch.Tensor) for beta in betas]
    if any(tensors) and not all(tensors):
        raise ValueError(f"betas must be either both floats or both Tensors, got {betas!r}")
    if any(tensors):
        where = "capturable=False and foreach=True" if foreach and not capturable else "FP8AdamW"
        raise ValueError(f"betas[0] as a Tensor is not supported for {where}: the kernels take betas as numbers; pass floats")
    if not 0.0 <= weight_decay:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; it must be 0 or more")
