"""The fused AdamW step on encoded moments: `coat_kernels::adamw_fp8_` over tensor lists.

Optimizers in eager mode launch a prepared `AdamWFP8Bucket` instead of calling the op: passing 6,000 tensors through the
dispatcher costs more than the step itself for many small ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...formats import get_codec, num_groups
from ...formats.parameters import PARAM_DTYPES
from .._library import LIBRARY
from .bucket import AdamWFP8Bucket, StateLists
from .settings import Hyperparameters, StateFormat, storage_rounding

__all__ = ["AdamWFP8Bucket", "Hyperparameters", "StateFormat", "StateLists", "adamw_fp8_", "check_adamw_fp8", "storage_rounding"]

LIBRARY.define(
    "adamw_fp8_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] amaxs, "
    "Tensor(e!)[] k16s, Tensor(f!)[] residuals, Tensor(g!)[] steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, *, "
    "bool maximize=False, str exp_avg_codec='e4m3_expand', str exp_avg_sq_codec='e4m3_expand', int group_size=128, "
    "str exp_avg_rounding='nearest', str exp_avg_sq_rounding='nearest', str param_rounding='nearest', int seed=0, "
    "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)


def check_adamw_fp8(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    amaxs: list[Tensor],
    k16s: list[Tensor],
    residuals: list[Tensor],
    steps: list[Tensor],
    fmt: StateFormat,
) -> None:
    """The checks that the op and its fake share: list lengths, one device, dtypes, shapes, contiguity.

    Raises:
        ValueError, TypeError: naming the list, the position, what was got and what is needed.
    """
    lists: dict[str, tuple[list[Tensor], tuple[torch.dtype, ...]]] = {
        "params": (params, PARAM_DTYPES),
        "grads": (grads, PARAM_DTYPES),
        "exp_avgs": (exp_avgs, (fmt.exp_avg.array_dtype,)),
        "exp_avg_sqs": (exp_avg_sqs, (fmt.exp_avg_sq.array_dtype,)),
        "amaxs": (amaxs, (torch.float32,)),
        "k16s": (k16s, (torch.uint8,)),
        "steps": (steps, (torch.float32,)),
    }
    if fmt.param_rounding == "split":
        lists["residuals"] = (residuals, (torch.int8,))
    elif residuals:
        raise ValueError(f"residuals belong to param_rounding='split', got {len(residuals)} with {fmt.param_rounding!r}; pass []")
    for name, (tensors, dtypes) in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors and params {len(params)}; every parameter needs one")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.dtype not in dtypes or tensor.dtype != tensors[0].dtype:
                raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}; one launch takes one dtype of {', '.join(map(str, dtypes))}")
            if tensor.device != params[0].device:
                raise ValueError(f"{name}[{i}] is on {tensor.device} and params[0] on {params[0].device}; step each device on its own")
            groups = num_groups(param.numel(), fmt.group_size) if fmt.quantized else 0
            shapes = {"amaxs": (groups, 2), "k16s": (groups, 2), "steps": ()}
            shapes |= {"exp_avgs": fmt.exp_avg.codes_shape(param.shape), "exp_avg_sqs": fmt.exp_avg_sq.codes_shape(param.shape)}
            shape = shapes.get(name, tuple(param.shape))
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
    amaxs: list[Tensor],
    k16s: list[Tensor],
    residuals: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    *,
    maximize: bool = False,
    exp_avg_codec: str = "e4m3_expand",
    exp_avg_sq_codec: str = "e4m3_expand",
    group_size: int = 128,
    exp_avg_rounding: str = "nearest",
    exp_avg_sq_rounding: str = "nearest",
    param_rounding: str = "nearest",
    seed: int = 0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[StateLists, StateFormat, Hyperparameters]:
    """The schema's arguments, checked, as what a bucket takes."""
    fmt = StateFormat(
        get_codec(exp_avg_codec), get_codec(exp_avg_sq_codec), group_size, exp_avg_rounding, exp_avg_sq_rounding, param_rounding, seed
    )
    check_adamw_fp8(params, grads, exp_avgs, exp_avg_sqs, amaxs, k16s, residuals, steps, fmt)
    state = StateLists(exp_avgs, exp_avg_sqs, amaxs, k16s, residuals, steps, list(range(len(params))))
    return state, fmt, Hyperparameters(lr, beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf)


def _adamw_fp8_(params: list[Tensor], grads: list[Tensor], *args: Any, **kwargs: Any) -> None:
    state, fmt, hyper = _parse(params, grads, *args, **kwargs)
    if params:
        AdamWFP8Bucket(params, grads, state.states(fmt), state.indices, fmt).step(hyper, grads)


def _adamw_fp8_fake(*args: Any, **kwargs: Any) -> None:
    _parse(*args, **kwargs)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("adamw_fp8_", _adamw_fp8_, _key)
torch.library.register_fake("coat_kernels::adamw_fp8_", _adamw_fp8_fake, lib=LIBRARY)

#: Tensor-list op: one AdamW step on encoded moments, in place. See the schema above and `reference.adamw_fp8` for shapes and formula.
adamw_fp8_ = torch.ops.coat_kernels.adamw_fp8_
