"""Every optimizer of the package as torch's own test database describes one (`torch.testing._internal.common_optimizers`).

Each is there twice: as it is, where the small tensors of the tests keep float32 states; and with every tensor quantized.
What of torch's configurations is left out is left out in `supported`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.testing._internal import common_optimizers as torch_db

from coat_kernels.optim import AdamW8bit, AutomagicCameAMP, CAME8bit, FP8AdamW, FP8QuantizationConfig, Lion8bit, Muon8bit

Input, ErrorInput = torch_db.OptimizerInput, torch_db.ErrorOptimizerInput


def quantized(cls: type[Optimizer], suffix: str = "", **options: Any) -> type[Optimizer]:
    """`cls` with every tensor quantized, whatever its size."""
    options = options or {"min_quant_numel": 0}

    def init(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, params, *args, **options, **kwargs)

    return type(f"{cls.__name__}{suffix}QuantAll", (cls,), {"__init__": init})


def fp8(m1: str, m2: str) -> type[Optimizer]:
    config = FP8QuantizationConfig(m1_format=m1, m2_format=m2)
    return quantized(FP8AdamW, f"_{m1}_{m2}", min_quant_numel=0, fp8_config=config)


MUON = (Muon8bit, quantized(Muon8bit))
#: AdamW classes and what an element's update may be off by, in units of lr: rounding, or a codec's error over three steps.
ADAMW = {
    FP8AdamW: 1e-5,
    AdamW8bit: 1e-5,
    quantized(FP8AdamW): 0.15,
    quantized(AdamW8bit): 0.15,
    fp8("softsign8", "log8"): 0.15,
    # four bits: steps of a third of the value and more
    fp8("e2m1", "e2m1"): 1.0,
}
LION = (Lion8bit, quantized(Lion8bit))
CAME = (CAME8bit, quantized(CAME8bit))
CAMEAMP = (AutomagicCameAMP, quantized(AutomagicCameAMP, min_8bit_size=0))


def supported(kwargs: dict[str, Any]) -> bool:
    """Configurations of torch's database that are not refused by design: no running maximum, betas as numbers."""
    return not kwargs.get("amsgrad") and not any(isinstance(beta, torch.Tensor) for beta in kwargs.get("betas", ()))


def lion_inputs(device: str, dtype: torch.dtype | None = None) -> list[Input]:
    """Lion is not in torch: its arguments' usual variations."""
    changes = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "Tensor lr": {"lr": torch.tensor(0.001)},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "betas": {"betas": (0.95, 0.98)},
    }
    return [Input(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in changes.items()]


def came_inputs(device: str, dtype: torch.dtype | None = None) -> list[Input]:
    """CAME and CameAMP are not in torch: their arguments' usual variations, with a warm-up that ends within the tests' steps."""
    changes = {
        "non-default lr": {"lr": 5e-3},
        "Tensor lr": {"lr": torch.tensor(1e-3)},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "betas": {"betas": (0.85, 0.98, 0.995)},
    }
    return [Input(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in changes.items()]


def cameamp_inputs(device: str, dtype: torch.dtype | None = None) -> list[Input]:
    inputs = came_inputs(device, dtype)
    for case in inputs:
        case.kwargs = {"warmup_steps": 6, "max_lr": 1e-2, **case.kwargs}
    return inputs


def lion_errors(device: str, dtype: torch.dtype) -> list[ErrorInput]:
    errors = torch_db.get_error_inputs_for_all_optims(device, dtype)
    if device == "cpu":
        bad = {"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"
        errors.append(ErrorInput(Input(params=None, kwargs=bad[0], desc="beta1 of 1"), error_type=ValueError, error_regex=bad[1]))
    return errors


def muon_errors(device: str, dtype: torch.dtype) -> list[ErrorInput]:
    """torch's, but for the class's name in messages, and complex parameters: they are refused at construction here."""
    errors = []
    for case in torch_db.optim_error_inputs_func_muon(device, dtype):
        if "complex" in case.error_regex:
            case.error_type, case.error_regex = TypeError, "steps float32, bfloat16 and float16 parameters"
        case.error_regex = case.error_regex.replace("Muon only", "Muon8bit only").replace("arbitrary", "'arbitrary'")
        errors.append(case)
    return errors


def info(cls: type[Optimizer], inputs: Callable[..., list[Input]], errors: Callable[..., list[ErrorInput]]) -> torch_db.OptimizerInfo:
    return torch_db.OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=(
            [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
            [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4), lambda opt: ExponentialLR(opt, gamma=0.9)],
        ),
        supported_impls=("fused", "foreach"),
        has_capturable_arg=True,
        supports_complex=False,
        supports_fused_on=("cpu", "cuda"),
    )


INFOS = [
    *(info(cls, torch_db.optim_inputs_func_adamw, torch_db.optim_error_inputs_func_adamw) for cls in ADAMW),
    *(info(cls, lion_inputs, lion_errors) for cls in LION),
    *(info(cls, torch_db.optim_inputs_func_muon, muon_errors) for cls in MUON),
    *(info(cls, came_inputs, torch_db.get_error_inputs_for_all_optims) for cls in CAME),
    *(info(cls, cameamp_inputs, torch_db.get_error_inputs_for_all_optims) for cls in CAMEAMP),
]
