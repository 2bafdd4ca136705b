"""Every optimizer of the package, once with its states in float32 and once, or oftener, with all of them in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from coat_kernels import optim

FLOAT32 = "float32"
#: More elements than any tensor has: nothing is quantized.
NEVER = 2**62


def least_numel(form: str) -> int:
    """From how many elements on a form's tensors are quantized: all of them, or none."""
    return NEVER if form == FLOAT32 else 0


@dataclass(frozen=True)
class Family:
    """An optimizer and its forms.

    Args:
        lrs: learning rates of the sweep.
        forms: names of the 8-bit forms.
        build: (model, names of its outer layers, lr, weight decay, steps of the run, form) to the optimizers that train it.
        decay_factor: what the work's weight decay, meant for AdamW, is multiplied by.
    """

    lrs: tuple[float, ...]
    build: Callable[..., list[Optimizer]]
    forms: tuple[str, ...] = ("8-bit",)
    decay_factor: float = 1.0


def _fp8_adamw(network: nn.Module, outer, lr: float, decay: float, steps: int, form: str) -> list[Optimizer]:
    m1, _, m2 = form.partition("+")
    config = None if form == FLOAT32 else optim.FP8QuantizationConfig(m1_format=m1, m2_format=m2 or m1)
    return [optim.FP8AdamW(network.parameters(), lr, weight_decay=decay, fp8_config=config, min_quant_numel=least_numel(form))]


def _plain(name: str) -> Callable[..., list[Optimizer]]:
    def build(network: nn.Module, outer, lr: float, decay: float, steps: int, form: str) -> list[Optimizer]:
        return [getattr(optim, name)(network.parameters(), lr, weight_decay=decay, min_quant_numel=least_numel(form))]

    return build


def _muon(network: nn.Module, outer: tuple[str, ...], lr: float, decay: float, steps: int, form: str) -> list[Optimizer]:
    """Muon on the hidden matrices, at the learning rate of the AdamW that takes the rest."""
    matrices, rest = [], []
    for name, parameter in network.named_parameters():
        (matrices if parameter.ndim == 2 and name.split(".")[0] not in outer else rest).append(parameter)
    options = {"lr": lr, "weight_decay": decay, "min_quant_numel": least_numel(form)}
    return [optim.Muon8bit(matrices, adjust_lr_fn="match_rms_adamw", **options), optim.AdamW8bit(rest, **options)]


def cameamp_scale(lr: float, steps: int) -> dict[str, float]:
    """CameAMP's lengths and learning rates for a run of so many steps at this lr.

    Half the run is its warm-up. The mask of learning rates may then reach 2.5 lr, where all signs agree, and may fall to the
    fraction of lr that the defaults allow between max_lr and min_lr.
    """
    warmup = max(2, steps // 2)
    return {"lr": lr, "max_lr": 3 * lr, "min_lr": 1e-4 * lr, "lr_bump": 1.5 * lr / warmup, "warmup_steps": warmup}


def _cameamp(network: nn.Module, outer, lr: float, decay: float, steps: int, form: str) -> list[Optimizer]:
    states = {"min_8bit_size": NEVER} if form == FLOAT32 else {"force_8bit": True}
    scale = cameamp_scale(lr, steps)
    return [optim.AutomagicCameAMP(network.parameters(), profile="balanced", verbose=False, weight_decay=decay, **scale, **states)]


FAMILIES: dict[str, Family] = {
    "FP8AdamW": Family((2e-3, 4e-3, 8e-3, 1.6e-2), _fp8_adamw, ("e4m3", "e4m3+log8", "softsign8+log8")),
    "AdamW8bit": Family((2e-3, 4e-3, 8e-3, 1.6e-2), _plain("AdamW8bit")),
    # the usual exchange with AdamW: a fifth of the learning rate, five times the decay
    "Lion8bit": Family((2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3), _plain("Lion8bit"), decay_factor=5.0),
    "CAME8bit": Family((2.5e-4, 5e-4, 1e-3, 2e-3), _plain("CAME8bit")),
    "Muon8bit": Family((2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), _muon),
    "AutomagicCameAMP": Family((1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), _cameamp),
}
