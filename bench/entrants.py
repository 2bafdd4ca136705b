"""The optimizers that are measured: this package's, torch's, and the peers that are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .environment import version

#: One setting for all. The weight decay makes 1 % of the first update, so that a wrong one fails the check.
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}

Params = list[torch.nn.Parameter]


def _adamw(params: Params) -> Optimizer:
    return torch.optim.AdamW(params, **SETTINGS, foreach=False, fused=False)


@dataclass(frozen=True)
class Entrant:
    """One optimizer in the contest.

    Args:
        name: how the row calls it.
        distribution: the package whose version the row names, and whose absence skips it.
        build: makes the optimizer with `SETTINGS`.
        devices: where it can run.
        quantized: whether its moments lose precision; sets the tolerance of the check after several steps.
        first_step_tolerance: relative error allowed in the first update of float32 parameters.
        oracle: makes the optimizer whose updates it must take, in float32; `torch.optim.AdamW` unless said otherwise.
        works: part of the names of the works it takes part in.
    """

    name: str
    distribution: str
    build: Callable[[Params], Optimizer]
    devices: tuple[str, ...] = ("cpu", "cuda")
    quantized: bool = True
    first_step_tolerance: float = 2e-3
    oracle: Callable[[Params], Optimizer] = _adamw
    works: str = ""

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if version(self.distribution) is None:
            return f"{self.distribution} is not installed (pip install -r requirements/bench.txt)"
        if device not in self.devices:
            return f"{self.name} runs on {' and '.join(self.devices)} only"
        return None


def _torch(**kwargs) -> Callable[[Params], Optimizer]:
    return lambda params: torch.optim.AdamW(params, **SETTINGS, **kwargs)


def _coat(**config) -> Callable[[Params], Optimizer]:
    def build(params: Params) -> Optimizer:
        from coat_kernels.optim import FP8AdamW, FP8QuantizationConfig

        return FP8AdamW(params, **SETTINGS, fp8_config=FP8QuantizationConfig(**config))

    return build


def _family(name: str, settings: dict[str, Any] = SETTINGS, **options) -> Callable[[Params], Optimizer]:
    """Another optimizer of the package, by its name there."""

    def build(params: Params) -> Optimizer:
        import coat_kernels.optim

        return getattr(coat_kernels.optim, name)(params, **settings, **options)

    return build


_LION = {name: SETTINGS[name] for name in ("lr", "betas", "weight_decay")}
#: CameAMP keeps to a phase: a warm-up that never ends, or none.
_CAMEAMP = {"lr": 1e-3, "max_lr": 1e-2, "profile": "balanced", "verbose": False}
_NEVER = 1 << 40  # elements: more than any tensor has


def _cameamp(warmup_steps: int) -> dict[str, Any]:
    """What its two entrants share; the oracle is the PyTorch reference on float32 states."""
    settings = {**_CAMEAMP, "warmup_steps": warmup_steps}
    exact = {"min_8bit_size": _NEVER, "fused": False}
    return {
        "build": _family("AutomagicCameAMP", settings),
        "oracle": _family("AutomagicCameAMP", settings, **exact),
        "works": "x 16x3072 fp32",
    }


def _bitsandbytes(params: Params) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **SETTINGS)


def _torchao(name: str) -> Callable[[Params], Optimizer]:
    def build(params: Params) -> Optimizer:
        import torchao.optim

        return getattr(torchao.optim, name)(params, **SETTINGS)

    return build


def _flashoptim(params: Params) -> Optimizer:
    from flashoptim import FlashAdamW

    # without the parameter residual: the same bytes of parameter as every other entrant
    return FlashAdamW(params, **SETTINGS, master_weight_bits=None)


def _deepspeed(params: Params) -> Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, **SETTINGS, adamw_mode=True)


#: 5e-6: float32 rounding of parameters of 0.1 beside an update of 0.01 is 3e-7. 2e-3 (default): bitsandbytes decays the
#: weights after the update, which differs by lr · weight_decay = 1e-3 of it.
BASELINE = Entrant("torch fused", "torch", _torch(fused=True), quantized=False, first_step_tolerance=5e-6)
ENTRANTS = (
    BASELINE,
    Entrant("torch foreach", "torch", _torch(foreach=True), quantized=False, first_step_tolerance=5e-6),
    Entrant("coat e4m3", "torch", _coat(), first_step_tolerance=5e-6),
    Entrant("coat e4m3 log8", "torch", _coat(m2_format="log8"), first_step_tolerance=5e-6),
    Entrant("coat AdamW8bit", "torch", _family("AdamW8bit"), first_step_tolerance=5e-6),
    Entrant(
        "coat Lion8bit",
        "torch",
        _family("Lion8bit", _LION),
        first_step_tolerance=5e-6,
        oracle=_family("Lion8bit", _LION, min_quant_numel=_NEVER, fused=False),
    ),
    Entrant("coat CameAMP, warm-up", "torch", **_cameamp(1_000_000)),
    Entrant("coat CameAMP", "torch", **_cameamp(0)),
    Entrant("bitsandbytes AdamW8bit", "bitsandbytes", _bitsandbytes),
    Entrant("torchao AdamWFp8", "torchao", _torchao("AdamWFp8")),
    Entrant("torchao AdamW8bit", "torchao", _torchao("AdamW8bit")),
    Entrant("FlashOptim FlashAdamW", "flashoptim", _flashoptim, devices=("cuda",)),
    Entrant("DeepSpeed CPUAdam", "deepspeed", _deepspeed, devices=("cpu",), quantized=False),
)


def _plain_tensors(value: object) -> Iterable[Tensor]:
    """The plain tensors behind a state entry: itself, the parts of a subclass, or those of a holder object."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _plain_tensors(getattr(value, name))
        else:
            yield value
    elif hasattr(value, "__dict__"):
        for part in vars(value).values():
            yield from _plain_tensors(part)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of per-element state and its metadata. Step counts do not count; what tensors share counts once."""
    seen = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if key != "step":
                for tensor in _plain_tensors(value):
                    seen[tensor.data_ptr(), tensor.dtype] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
