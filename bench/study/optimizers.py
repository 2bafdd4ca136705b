"""The optimizers of the study, and the float32 shadow that measures how far an update is off."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from coat_kernels.formats.codecs import CODECS
from coat_kernels.formats.reference import decode_group, encode_group

CONTROL_GROUP = 4096


class ControlAdamW(Optimizer):
    """AdamW whose moments pass through the reference codec without expansion (k = 1), in groups of 4096.

    What the study must be able to tell from the package's optimizer. Not an option of the package: it lives here.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @staticmethod
    def _carried(moment: Tensor, signed: bool) -> Tensor:
        codec = CODECS["e4m3"]
        return decode_group(*encode_group(moment, codec, CONTROL_GROUP, signed=signed), codec, CONTROL_GROUP)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if not (state := self.state[p]):
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                m = state["exp_avg"].lerp_(p.grad, 1 - beta1)
                v = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                root = (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                p.addcdiv_(m, root, value=-group["lr"] / (1 - beta1 ** state["step"]))
                state["exp_avg"] = self._carried(m, signed=True)
                state["exp_avg_sq"] = self._carried(v, signed=False)


class Shadow:
    """float32 moments fed with a run's own gradients: what AdamW would do at this point of that very run."""

    def __init__(self, params: list[Tensor], betas: tuple[float, float], eps: float) -> None:
        self.params, self.betas, self.eps = params, betas, eps
        self.exp_avg = [torch.zeros_like(p) for p in params]
        self.exp_avg_sq = [torch.zeros_like(p) for p in params]
        self.steps = 0

    @torch.no_grad()
    def observe(self) -> None:
        """Takes in the gradients of the step that is about to be done."""
        grads = [p.grad for p in self.params]
        self.steps += 1
        torch._foreach_lerp_(self.exp_avg, grads, 1 - self.betas[0])
        torch._foreach_mul_(self.exp_avg_sq, self.betas[1])
        torch._foreach_addcmul_(self.exp_avg_sq, grads, grads, value=1 - self.betas[1])

    @torch.no_grad()
    def update_error(self, before: list[Tensor], lr: float, weight_decay: float) -> float:
        """||update done - AdamW's|| / ||AdamW's||, over all parameters; `before` is where they were."""
        off, size = 0.0, 0.0
        for p, start, m, v in zip(self.params, before, self.exp_avg, self.exp_avg_sq, strict=True):
            root = (v / (1 - self.betas[1] ** self.steps)).sqrt_().add_(self.eps)
            update = (m / (1 - self.betas[0] ** self.steps)).div_(root).mul_(-lr)
            done = p - start * (1 - lr * weight_decay)
            off += (done - update).square().sum().item()
            size += update.square().sum().item()
        return (off / size) ** 0.5


def _torch_adamw(params: list[Tensor], **settings) -> Optimizer:
    return torch.optim.AdamW(params, **settings, fused=True)


def _coat(**config) -> Callable[..., Optimizer]:
    def build(params: list[Tensor], **settings) -> Optimizer:
        from coat_kernels.optim import FP8AdamW, FP8QuantizationConfig

        # every tensor quantized, norms and biases too: the package's default would spare those under 4096 elements
        return FP8AdamW(params, **settings, min_quant_numel=0, fp8_config=FP8QuantizationConfig(**config))

    return build


REFERENCE = "torch AdamW fp32"
CONTROL = "control: k = 1, groups of 4096"
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    REFERENCE: _torch_adamw,
    "FP8AdamW e4m3": _coat(),
    "FP8AdamW e4m3, log8": _coat(m2_format="log8"),
    CONTROL: ControlAdamW,
}
