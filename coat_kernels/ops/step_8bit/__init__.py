"""The fused step on blockwise 8-bit moments, `coat_kernels::step_8bit_` over tensor lists: AdamW, Lion and heavy-ball momentum.

Optimizers in eager mode launch a prepared `Step8bitBucket` instead of calling the op, whose tensor lists cost more than many small steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...formats.parameters import PARAM_DTYPES
from .._library import LIBRARY
from .bucket import Step8bitBucket
from .settings import RULES, BlockwiseFormat, Hyperparameters8bit

__all__ = ["RULES", "BlockwiseFormat", "Hyperparameters8bit", "Step8bitBucket", "check_step_8bit", "step_8bit_"]

LIBRARY.define(
    "step_8bit_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_absmaxs, "
    "Tensor(e!)[] exp_avg_sq_absmaxs, Tensor(f!)[] residuals, Tensor(g!)[] steps, Tensor lr, float beta1, float beta2, float eps=1e-8, "
    "float weight_decay=0.0, *, str rule='adamw', bool quantized=True, int block_size=256, str param_rounding='nearest', int seed=0, "
    "bool maximize=False, bool nesterov=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)


def check_step_8bit(
    params: list[Tensor], grads: list[Tensor], arrays: dict[str, list[Tensor]], steps: list[Tensor], fmt: BlockwiseFormat
) -> None:
    """The checks that the op and its fake share: list lengths, one device, dtypes, shapes, contiguity.

    Args:
        arrays: a list for each name that `fmt.arrays` may have, empty where the format lacks it.

    Raises:
        ValueError, TypeError: naming the list, the position, what was got and what is needed.
    """
    needed = [{array.name: array for array in fmt.arrays(param.shape)} for param in params]
    lists = {"params": params, "grads": grads, "steps": steps}
    for name, tensors in arrays.items():
        if needed and name not in needed[0] and tensors:
            raise ValueError(f"{name} is no part of {fmt}, got {len(tensors)} tensors; pass []")
        if needed and name in needed[0]:
            lists[name] = tensors
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors and params {len(params)}; every parameter needs one")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            dtypes: tuple[torch.dtype, ...] = PARAM_DTYPES
            shape = tuple(param.shape)
            if name == "steps":
                dtypes, shape = (torch.float32,), ()
            elif name in arrays:
                dtypes, shape = (needed[i][name].dtype,), needed[i][name].shape
            if tensor.dtype not in dtypes or tensor.dtype != tensors[0].dtype:
                raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}; one launch takes one dtype of {', '.join(map(str, dtypes))}")
            if tensor.device != params[0].device:
                raise ValueError(f"{name}[{i}] is on {tensor.device} and params[0] on {params[0].device}; step each device on its own")
            if tuple(tensor.shape) != shape:
                got, want = tuple(tensor.shape), tuple(param.shape)
                raise ValueError(f"{name}[{i}] has shape {got}; {shape} is needed for a parameter of shape {want}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{i}] is not contiguous; pass a contiguous tensor (the optimizer stages such parameters itself)")


def _parse(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_absmaxs: list[Tensor],
    exp_avg_sq_absmaxs: list[Tensor],
    residuals: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    rule: str = "adamw",
    quantized: bool = True,
    block_size: int = 256,
    param_rounding: str = "nearest",
    seed: int = 0,
    maximize: bool = False,
    nesterov: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[list[dict[str, Tensor]], BlockwiseFormat, Hyperparameters8bit]:
    """The schema's arguments, checked, as what a bucket takes."""
    fmt = BlockwiseFormat(rule, quantized, block_size, param_rounding, seed)
    arrays = {
        "exp_avg": exp_avgs,
        "exp_avg_sq": exp_avg_sqs,
        "exp_avg_absmax": exp_avg_absmaxs,
        "exp_avg_sq_absmax": exp_avg_sq_absmaxs,
        "residual": residuals,
    }
    check_step_8bit(params, grads, arrays, steps, fmt)
    held = {name: tensors for name, tensors in arrays.items() if tensors}
    states = [{"step": step, **{name: tensors[i] for name, tensors in held.items()}} for i, step in enumerate(steps)]
    return states, fmt, Hyperparameters8bit(lr, beta1, beta2, eps, weight_decay, maximize, nesterov, grad_scale, found_inf)


def _step_8bit_(params: list[Tensor], grads: list[Tensor], *args: Any, **kwargs: Any) -> None:
    states, fmt, hyper = _parse(params, grads, *args, **kwargs)
    if params:
        Step8bitBucket(params, grads, states, list(range(len(params))), fmt).step(hyper, grads)


def _step_8bit_fake(*args: Any, **kwargs: Any) -> None:
    _parse(*args, **kwargs)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("step_8bit_", _step_8bit_, _key)
torch.library.register_fake("coat_kernels::step_8bit_", _step_8bit_fake, lib=LIBRARY)

#: Tensor-list op: one step on blockwise 8-bit moments, in place. See the schema above and `reference.step_8bit` for shapes and formulas.
step_8bit_ = torch.ops.coat_kernels.step_8bit_
