"""Muon with its momentum in bitsandbytes' dynamic 8-bit map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.step_8bit import Hyperparameters8bit, Step8bitBucket
from ._adam import check_lr, check_min_quant_numel, check_weight_decay
from ._blockwise import BlockwiseOptimizer
from ._plan import is_dtensor

#: Of the quintic Newton-Schulz iteration, chosen for its slope at zero (K. Jordan et al., Muon, 2024).
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
LR_ADJUSTMENTS = (None, "original", "match_rms_adamw")


@dataclass(frozen=True)
class _MuonSettings:
    momentum: Hyperparameters8bit
    lr: float | Tensor
    weight_decay: float
    ns_coefficients: tuple[float, float, float]
    ns_steps: int
    eps: float
    adjust_lr_fn: str | None


class _MuonBucket(Step8bitBucket):
    """Momentum of all matrices in one launch, into a buffer that lives for the step; then the update, a shape at a time."""

    def __init__(self, params: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        self.weights = params
        super().__init__(self._buffers(), *args, **kwargs)
        self.params = ()

    def _buffers(self) -> list[Tensor]:
        """Zeros in each weight's shape, matrices of one shape side by side."""
        order = sorted(range(len(self.weights)), key=lambda i: tuple(self.weights[i].shape))
        dtype = torch.bfloat16 if self.weights[0].is_cuda else torch.float32
        arena = torch.zeros(sum(w.numel() for w in self.weights), dtype=dtype, device=self.weights[0].device)
        buffers: list[Tensor] = [arena] * len(order)
        offset = 0
        for i in order:
            weight = self.weights[i]
            buffers[i] = arena[offset : offset + weight.numel()].view(weight.shape)
            offset += weight.numel()
        return buffers

    def set_params(self, params: Sequence[Tensor]) -> None:
        self.weights = params

    def step(self, hyper: Any, grads: Sequence[Tensor]) -> None:
        found_inf = hyper.momentum.found_inf
        on_gpu = self.backend == "CUDA"
        if found_inf is not None and not on_gpu and bool(found_inf):
            return
        buffers = self._buffers()
        self.params = buffers
        self.table.set_params(buffers)
        super().step(hyper.momentum, grads)
        self.params = ()
        # where a GPU skips the step the buffer stays zero, and so does the update; the decay must stop too
        lr = hyper.lr.reshape(()).to(self.device) if isinstance(hyper.lr, Tensor) else hyper.lr
        lr = lr if found_inf is None else lr * (1 - found_inf.reshape(()).to(self.device))
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, weight in enumerate(self.weights):
            by_shape.setdefault(tuple(weight.shape), []).append(i)
        for shape, positions in by_shape.items():
            if 0 in shape:
                continue
            weights = [self.weights[i] for i in positions]
            # side by side in memory: stacking them is a view
            first = buffers[positions[0]]
            stacked = first.as_strided((len(positions), *shape), (first.numel(), shape[1], 1))
            update = orthogonalize(stacked, hyper.ns_coefficients, hyper.ns_steps, hyper.eps)
            update = update * (lr * adjusted_ratio(hyper.adjust_lr_fn, shape))
            torch._foreach_mul_(weights, 1 - lr * hyper.weight_decay)
            torch._foreach_sub_(weights, list(update.to(weights[0].dtype).unbind()))


class Muon8bit(BlockwiseOptimizer):
    r"""`torch.optim.Muon` with one byte of momentum a parameter: the update is the orthogonalized momentum.

    .. math::
        m \leftarrow \mu m + (1 - \mu) g, \qquad
        p \leftarrow p\,(1 - \text{lr}\,\lambda) - \text{lr}\,r\,\text{NS}((1 - \mu) g + \mu m)

    NS is the Newton-Schulz iteration and r the learning rate's adjustment to the matrix. Momentum of all matrices advances in
    one launch; the iteration runs on all matrices of a shape at once, in bfloat16 on GPUs and float32 on CPUs.

    Args:
        params: matrices: float32, bfloat16 or float16 parameters of 2 dimensions; give the rest to an AdamW.
        lr: learning rate, a float or a 1-element tensor.
        weight_decay: decoupled weight decay.
        momentum: decay rate in [0, 1).
        nesterov: look one step ahead.
        ns_coefficients: of the iteration's three terms.
        eps: lower bound of the norm that the iteration divides by.
        ns_steps: iterations, 1 to 99.
        adjust_lr_fn: None or "original": r = sqrt(max(1, rows/cols)); "match_rms_adamw": r = 0.2 sqrt(max(rows, cols)), for AdamW's lr.
        block_size, min_quant_numel, maximize, foreach, fused, capturable, differentiable: as in `AdamW8bit`.

    Raises:
        ValueError, TypeError, RuntimeError: at construction or at the first step, for what is not supported.
    """

    _family = "muon"
    _rule = "momentum"
    _bucket_type = _MuonBucket

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        block_size: int = 256,
        min_quant_numel: int = 4096,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_lr(lr, foreach=foreach, capturable=capturable)
        check_weight_decay(weight_decay)
        self._set_block_size(block_size)
        self.param_rounding = "nearest"
        self.min_quant_numel = check_min_quant_numel(min_quant_numel)
        self.seed = 0
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"momentum should be in [0, 1) but is: {group['momentum']}")
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(f"ns_coefficients must be 3 numbers, got {group['ns_coefficients']!r}")
        if not 1 <= group["ns_steps"] < 100:
            raise ValueError(f"ns_steps must be 1 to 99, got {group['ns_steps']}")
        if group["adjust_lr_fn"] not in LR_ADJUSTMENTS:
            name = group["adjust_lr_fn"]
            raise ValueError(f"Adjust learning rate function {name!r} is not supported; choose one of {LR_ADJUSTMENTS}")
        for position, param in enumerate(group["params"]):
            if param.ndim != 2:
                raise ValueError(
                    f"Muon8bit only supports 2D parameters whereas parameter {position} of its group has shape {tuple(param.shape)}; "
                    "give it to AdamW8bit or FP8AdamW"
                )
            if is_dtensor(param):
                raise TypeError(
                    "Muon8bit orthogonalizes whole matrices and cannot step sharded (DTensor) parameters; use FP8AdamW for them"
                )
        super()._check_group(group)

    def _hyperparameters(self, group: dict[str, Any], grads: list[Any]) -> _MuonSettings:
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        # a momentum that averages: the kernel's m = beta1 m + g takes gradients divided by 1/(1 - momentum)
        scale = 1 / (1 - group["momentum"])
        momentum = Hyperparameters8bit(
            lr=0.0,
            beta1=group["momentum"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            grad_scale=torch.full((), scale, device=self._device(group)) if grad_scale is None else grad_scale * scale,
            found_inf=found_inf,
        )
        return _MuonSettings(
            momentum, group["lr"], group["weight_decay"], group["ns_coefficients"], group["ns_steps"], group["eps"], group["adjust_lr_fn"]
        )

    @staticmethod
    def _device(group: dict[str, Any]) -> torch.device:
        return group["params"][0].device if group["params"] else torch.device("cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` or `torch.optim.Muon.state_dict` returned; nothing changes if it cannot be read.

        Raises:
            ValueError: as the other optimizers.
        """
        states = state_dict.get("state", {})
        if any("momentum_buffer" in state for state in states.values()):
            # torch.optim.Muon counts no steps, and no part of this step depends on them
            renamed = {number: {"step": 0.0, "exp_avg": state["momentum_buffer"]} for number, state in states.items()}
            state_dict = {**state_dict, "state": renamed}
        super().load_state_dict(state_dict)

    def export_bitsandbytes_state_dict(self) -> dict[str, Any]:
        """Not offered.

        Raises:
            TypeError: bitsandbytes has no Muon.
        """
        raise TypeError("bitsandbytes has no Muon to go on with Muon8bit's state; keep its own state_dict()")


def adjusted_ratio(adjust_lr_fn: str | None, shape: tuple[int, ...]) -> float:
    """What a matrix's learning rate is multiplied by."""
    rows, cols = shape
    return 0.2 * math.sqrt(max(rows, cols)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, rows / cols))


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz: matrices [n, rows, cols] to about U Vᵀ of their singular value decompositions, singular values in 0.5 to 1.5."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
