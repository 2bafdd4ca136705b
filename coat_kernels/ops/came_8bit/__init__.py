"""The fused CAME step on 8-bit states: `coat_kernels::came_8bit_` over tensor lists.

Optimizers in eager mode launch a prepared `CameBucket` instead of calling the op.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from ...formats.parameters import PARAM_DTYPES
from .._library import LIBRARY
from .bucket import CameBucket
from .settings import CameFormat, CameSettings

__all__ = ["CameBucket", "CameFormat", "CameSettings", "came_8bit_", "check_came_8bit"]

_SCHEMA_TYPES = {"str": "str", "bool": "bool", "int": "int", "float": "float", "float | None": "float?", "Tensor | None": "Tensor?"}
#: Settings that stand before the keywords of the schema.
_POSITIONAL = ("lr", "betas", "eps", "grad_l1")


def _keywords(settings: type) -> list[str]:
    """Schema text of a settings class's fields: their names, types and defaults."""
    text = []
    for field in fields(settings):
        if field.name in _POSITIONAL or field.default is MISSING:
            continue
        default = f"'{field.default}'" if isinstance(field.default, str) else field.default
        text.append(f"{_SCHEMA_TYPES[str(field.type)]} {field.name}={default}")
    return text


LIBRARY.define(
    "came_8bit_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] arrays, Tensor(c!)[] steps, Tensor lr, float[3] betas, float[3] eps, "
    f"float grad_l1, *, {', '.join(_keywords(CameFormat) + _keywords(CameSettings))}) -> ()"
)


def check_came_8bit(params: list[Tensor], grads: list[Tensor], arrays: list[Tensor], steps: list[Tensor], fmt: CameFormat) -> None:
    """The checks that the op and its fake share: list lengths, one device, dtypes, shapes, contiguity.

    Raises:
        ValueError, TypeError: naming the list, the position, what was got and what is needed.
    """
    wanted = [(array.name, array.dtype, array.shape) for param in params for array in fmt.arrays(param.shape)]
    if len(grads) != len(params) or len(steps) != len(params) or len(arrays) != len(wanted):
        raise ValueError(
            f"{len(params)} params need as many grads and steps, and {len(wanted)} arrays (CameFormat.arrays of each shape, in order); "
            f"got {len(grads)}, {len(steps)} and {len(arrays)}"
        )
    for i, (param, grad, step) in enumerate(zip(params, grads, steps, strict=True)):
        for name, tensor, like in (("params", param, params[0]), ("grads", grad, grads[0])):
            if tensor.dtype not in PARAM_DTYPES or tensor.dtype != like.dtype:
                raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}; one launch takes one dtype of {', '.join(map(str, PARAM_DTYPES))}")
            if tensor.device != params[0].device or tensor.shape != param.shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] is {tuple(tensor.shape)} on {tensor.device}, contiguous: {tensor.is_contiguous()}; "
                    f"{tuple(param.shape)} on {params[0].device}, contiguous, is needed"
                )
        if step.dtype != torch.float32 or step.dim() or step.device.type != "cpu":
            raise TypeError(f"steps[{i}] is {step.dtype} {tuple(step.shape)} on {step.device}; a float32 scalar in host memory is needed")
    for i, (array, (name, dtype, shape)) in enumerate(zip(arrays, wanted, strict=True)):
        if array.dtype != dtype or tuple(array.shape) != tuple(shape) or array.device != params[0].device or not array.is_contiguous():
            raise ValueError(
                f"arrays[{i}] ({name}) is {array.dtype} {tuple(array.shape)} on {array.device}; {dtype} {tuple(shape)} on "
                f"{params[0].device}, contiguous, is needed"
            )


def _parse(
    params: list[Tensor],
    grads: list[Tensor],
    arrays: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    betas: list[float],
    eps: list[float],
    grad_l1: float,
    **options: Any,
) -> tuple[CameFormat, CameSettings]:
    """The schema's arguments, checked, as the settings they stand for."""
    names = {field.name for field in fields(CameFormat)}
    fmt = CameFormat(**{name: value for name, value in options.items() if name in names})
    check_came_8bit(params, grads, arrays, steps, fmt)
    numbers = {name: value for name, value in options.items() if name not in names}
    if len(betas) != 3 or len(eps) != 3:
        raise ValueError(f"betas and eps are three numbers each, got {betas} and {eps}")
    grad_l1 = grad_l1 if math.isfinite(grad_l1) else math.inf
    return fmt, CameSettings(lr, (betas[0], betas[1], betas[2]), (eps[0], eps[1], eps[2]), grad_l1=grad_l1, **numbers)


def _came_8bit_(params: list[Tensor], grads: list[Tensor], arrays: list[Tensor], steps: list[Tensor], *args: Any, **kwargs: Any) -> None:
    fmt, hyper = _parse(params, grads, arrays, steps, *args, **kwargs)
    if not params:
        return
    states, position = [], 0
    for param, step in zip(params, steps, strict=True):
        declared = fmt.arrays(param.shape)
        held = arrays[position : position + len(declared)]
        states.append({"step": step, **{array.name: tensor for array, tensor in zip(declared, held, strict=True)}})
        position += len(declared)
    CameBucket(params, grads, states, list(range(len(params))), fmt).step(hyper, grads)


def _came_8bit_fake(*args: Any, **kwargs: Any) -> None:
    _parse(*args, **kwargs)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("came_8bit_", _came_8bit_, _key)
torch.library.register_fake("coat_kernels::came_8bit_", _came_8bit_fake, lib=LIBRARY)

#: Tensor-list op: one CAME step on 8-bit states, in place. `arrays` are those of `CameFormat.arrays` for each parameter in turn;
#: `settings.CameFormat` and `settings.CameSettings` explain the rest, `reference.py` gives the formulas.
came_8bit_ = torch.ops.coat_kernels.came_8bit_
