"""State dictionaries: byte-exact saving and loading, conversion between formats, import from other libraries.

`Optimizer.load_state_dict` casts every state tensor to its parameter's dtype, which would destroy codes; so loading is done here.
Everything is read and checked before the optimizer is touched.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._native import CoatWarning
from ..formats import get_codec
from ..ops.state import Moment, StepFormat
from . import _bitsandbytes
from ._plan import is_dtensor, local
from ._states import allocate

if TYPE_CHECKING:
    from ._base import LowBitOptimizer

VERSION = 1
#: Key of a param group in a state dictionary, never in a live one.
FORMAT_KEY = "state_format"

#: What a group of `torch.optim.AdamW` holds beside its parameters.
_ADAMW_GROUP = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def save(optimizer: LowBitOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` with each tensor in storage of its own and the format in each param group.

    Raises:
        RuntimeError: a parameter is a DTensor. Its state is this rank's alone; as plain tensors a distributed checkpoint would take
            one rank's codes for everyone's.
    """
    if any(is_dtensor(param) for group in optimizer.param_groups for param in group["params"]):
        name = type(optimizer).__name__
        raise RuntimeError(f"{name} cannot save the state of sharded (DTensor) parameters yet; save this rank's with torch.save(optimizer)")
    states = {key: {k: _own(v) for k, v in state.items()} for key, state in state_dict["state"].items()}
    pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    groups = [{**packed, FORMAT_KEY: _describe(optimizer, live)} for packed, live in pairs]
    return {**state_dict, "state": states, "param_groups": groups}


def _own(value: Any) -> Any:
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def _describe(optimizer: LowBitOptimizer, group: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"version": VERSION, "optimizer": type(optimizer).__name__, "family": optimizer._family}
    formats = (optimizer._state_format(param, optimizer._step_count(param)) for param in group["params"])
    quantized = next((fmt for fmt in formats if fmt.quantized), None)
    return described if quantized is None else described | quantized.describe()


def export_adamw(optimizer: LowBitOptimizer) -> dict[str, Any]:
    """The optimizer's state in float32, as `torch.optim.AdamW` keeps it."""
    packed = Optimizer.state_dict(optimizer)
    params = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    states: dict[Any, Any] = {}
    for number, state in packed["state"].items():
        fmt = optimizer._state_format(params[number], optimizer._step_count(params[number]))
        moments = {moment.name: moment.decode(state, local(params[number]).shape).clone() for moment in fmt.moments}
        states[number] = {"step": state["step"].clone(), **moments}
    groups = []
    for group in packed["param_groups"]:
        values = {key: group.get(key, default) for key, default in _ADAMW_GROUP.items()}
        # the implementation switches chose between ours, not torch's
        groups.append({**values, "foreach": None, "fused": None, "params": group["params"]})
    return {"state": states, "param_groups": groups}


def load(optimizer: LowBitOptimizer, state_dict: dict[str, Any]) -> None:
    """Replace the optimizer's state and param groups by those of `state_dict`; see `LowBitOptimizer.load_state_dict`."""
    state_dict = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict
    _check_structure(optimizer, state_dict)
    state_dict = _bitsandbytes.translate(state_dict)
    for packed in state_dict["param_groups"]:
        described = packed.get(FORMAT_KEY, {})
        if described.get("family", optimizer._family) != optimizer._family:
            raise ValueError(
                f"the state dict is of {described['optimizer']}, whose states {type(optimizer).__name__} cannot go on from; "
                "load it into the optimizer that saved it, or start afresh"
            )

    saved_groups = state_dict["param_groups"]
    owners = {
        number: (param, saved)
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True)
        for param, number in zip(group["params"], saved["params"], strict=True)
    }
    orphans = [number for number in state_dict["state"] if number not in owners]
    if orphans:
        raise ValueError(f"state of parameters {orphans[:5]} belongs to none of the param groups; the state dict is truncated or foreign")
    converted: Counter[str] = Counter()
    states = {
        owners[number][0]: _read_state(optimizer, number, saved, *owners[number], converted)
        for number, saved in state_dict["state"].items()
        if saved
    }
    groups = [_read_group(live, saved) for live, saved in zip(optimizer.param_groups, saved_groups, strict=True)]
    for group in groups:
        optimizer._check_group(group)

    optimizer.__setstate__({"state": defaultdict(dict, states), "param_groups": groups})
    for change, count in converted.items():
        warnings.warn(f"the loaded state was converted, {change}, in {count} arrays; values moved by rounding", CoatWarning, stacklevel=3)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _check_structure(optimizer: LowBitOptimizer, state_dict: dict[str, Any]) -> None:
    name = type(optimizer).__name__
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(f"no optimizer state dict: {missing} missing; pass what the state_dict() of {name} or torch.optim.AdamW gave")
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved):
        raise ValueError(f"loaded state dict has a different number of parameter groups: {len(saved)}, the optimizer has {len(groups)}")
    for i, (live, packed) in enumerate(zip(groups, saved, strict=True)):
        if len(live["params"]) != len(packed["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {i} has {len(packed['params'])} parameters, the optimizer's {len(live['params'])}"
            )
        described = packed.get(FORMAT_KEY)
        if described is None:
            if packed.get("amsgrad"):
                raise ValueError(f"saved with amsgrad=True, which {name} does not support; resume it with torch.optim.AdamW")
            if packed.get("decoupled_weight_decay") is False and packed.get("weight_decay"):
                raise ValueError(f"the state dict is torch.optim.Adam's with L2 weight decay; {name} decays decoupled, as AdamW does")
        elif described.get("version") != VERSION:
            version = described.get("version")
            raise ValueError(f"the state dict has format version {version!r}; this coat_kernels reads version {VERSION}")


def _read_group(live: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The loaded param group: saved values, except which implementation runs where the dictionary is another optimizer's."""
    values = deepcopy({k: v for k, v in saved.items() if k not in ("params", FORMAT_KEY)})
    if saved.get(FORMAT_KEY, {}).get("optimizer") == _bitsandbytes.NAME:
        values = {k: v for k, v in values.items() if k in (*live, "initial_lr")}
    elif FORMAT_KEY not in saved:
        values.pop("decoupled_weight_decay", None)
        for key in ("foreach", "fused", "capturable", "differentiable"):
            values.pop(key, None)
    return {**live, **values, "params": live["params"]}


def _read_state(
    optimizer: LowBitOptimizer, number: Any, saved: dict[str, Any], param: Tensor, saved_group: dict[str, Any], converted: Counter[str]
) -> dict[str, Tensor]:
    """A fresh state of `param` filled from what was saved for parameter `number`; conversions are counted in `converted`."""
    if "max_exp_avg_sq" in saved:
        name = type(optimizer).__name__
        raise ValueError(f"parameter {number} has an amsgrad maximum, which {name} does not support; resume it with torch.optim.AdamW")
    step = torch.as_tensor(_entry(saved, "step", number), dtype=torch.float32)
    fmt = optimizer._state_format(param, int(step))
    target = local(param)
    (state,) = allocate([target.shape], fmt, target.device)
    state["step"].copy_(step)
    described = saved_group.get(FORMAT_KEY) or {}
    names = {"step", "residual"}
    for moment in fmt.moments:
        stored = _stored_as(moment, saved, number, described)
        _check_parts(stored, saved, number, target.shape)
        names |= {moment.name + suffix for suffix in (*moment.parts(target.shape), *stored.parts(target.shape))}
        if stored == moment:
            arrays = {suffix: saved[moment.name + suffix] for suffix in moment.parts(target.shape)}
        else:
            value = stored.decode({k: v.to(target.device) for k, v in saved.items() if isinstance(v, Tensor)}, target.shape)
            arrays = moment.encode(value)
            if stored.codec.quantized and moment.codec.quantized:
                converted[f"{moment.name} from {_words(stored)} to {_words(moment)}"] += 1
        for suffix, array in arrays.items():
            state[moment.name + suffix].copy_(array)
    for name in sorted(state.keys() - names):
        value = torch.as_tensor(_entry(saved, name, number))
        if tuple(value.shape) != tuple(state[name].shape):
            raise ValueError(f"{name} of parameter {number} has shape {tuple(value.shape)}; {tuple(state[name].shape)} is needed")
        if value.dtype != state[name].dtype:
            raise ValueError(
                f"{name} of parameter {number} is {value.dtype}; {state[name].dtype} is needed: it was saved in another width, or cast "
                "on the way; make the optimizer with the options it was saved with"
            )
        state[name].copy_(value)
    unknown = saved.keys() - state.keys() - names
    if unknown:
        raise ValueError(
            f"state of parameter {number} holds {sorted(map(str, unknown))}, which {type(optimizer).__name__} does not keep; "
            "load it into the optimizer that saved it"
        )
    _read_residual(state, saved, number, fmt)
    return state


def _words(moment: Moment) -> str:
    return f"{moment.codec.name} in groups of {moment.group_size}" if moment.codec.quantized else moment.codec.name


def _stored_as(moment: Moment, saved: dict[str, Any], number: Any, described: dict[str, Any]) -> Moment:
    """The moment as the dictionary holds it: perhaps in another codec or group size, perhaps in floats."""
    value = _entry(saved, moment.name, number)
    if any(f"{moment.name}{suffix}" in saved for suffix in ("_amax", "_absmax")):
        name, group_size = described.get(moment.name), described.get("group_size")
        if name is None or group_size is None:
            raise ValueError(
                f"parameter {number} holds codes, and its param group does not say of which codec; the state dict is truncated"
            )
        return replace(moment, codec=get_codec(name), group_size=group_size)
    if not value.is_floating_point():
        raise ValueError(f"{moment.name} of parameter {number} is {value.dtype} without its scales; it is truncated, or of another library")
    return moment if value.dtype == moment.codec.array_dtype else replace(moment, codec=get_codec("float32"))


def _check_parts(stored: Moment, saved: dict[str, Any], number: Any, shape: torch.Size) -> None:
    for suffix, (dtype, want) in stored.parts(shape).items():
        part = _entry(saved, stored.name + suffix, number)
        if tuple(part.shape) != want:
            raise ValueError(
                f"{stored.name + suffix} of parameter {number} has shape {tuple(part.shape)}; {want} is needed for a parameter of shape "
                f"{tuple(shape)}: it is truncated, or another parameter's"
            )
        if stored.codec.quantized and part.dtype != dtype:
            raise ValueError(f"{stored.name + suffix} of parameter {number} is {part.dtype}; {dtype} is needed: it was cast on the way")
        if suffix == "_k16" and part.numel() and int(part.min()) == 0:
            raise ValueError(f"{stored.name}_k16 of parameter {number} holds a 0, which no encoder writes; the state dict is damaged")


def _read_residual(state: dict[str, Tensor], saved: dict[str, Any], number: Any, fmt: StepFormat) -> None:
    residual = saved.get("residual")
    if "residual" not in state:
        if residual is not None:
            raise ValueError(
                f"parameter {number} was saved with param_rounding='split'; make the optimizer with it, or its low 8 bits are lost"
            )
    elif residual is not None:
        if residual.dtype != torch.int8 or residual.shape != state["residual"].shape:
            raise ValueError(
                f"residual of parameter {number} is {residual.dtype} of shape {tuple(residual.shape)}; "
                f"torch.int8 of shape {tuple(state['residual'].shape)} is needed"
            )
        state["residual"].copy_(residual)


def _entry(saved: dict[str, Any], key: str, number: Any) -> Any:
    try:
        return saved[key]
    except KeyError:
        raise ValueError(
            f"state of parameter {number} has no {key!r}, only {sorted(map(str, saved))}; it is truncated, or of an optimizer "
            "with other states"
        ) from None
