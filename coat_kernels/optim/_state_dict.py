"""State dictionaries: byte-exact saving and loading, import from and export to `torch.optim.AdamW`.

`Optimizer.load_state_dict` casts every state tensor to its parameter's dtype, which would destroy codes; so loading is done here.
Everything is read and checked before the optimizer is touched.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..formats import get_codec, num_groups
from ..formats.codecs import Codec
from ..ops.adamw_fp8 import StateFormat
from ._plan import is_dtensor, local
from ._states import allocate, moment_codecs

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
    described: dict[str, Any] = {"version": VERSION, "optimizer": type(optimizer).__name__}
    formats = [fmt for fmt in map(optimizer._state_format, group["params"]) if fmt.quantized]
    if formats:
        described |= {name: codec.name for name, codec in moment_codecs(formats[0])} | {"group_size": formats[0].group_size}
    return described


def export_adamw(optimizer: LowBitOptimizer) -> dict[str, Any]:
    """The optimizer's state in float32, as `torch.optim.AdamW` keeps it."""
    packed = Optimizer.state_dict(optimizer)
    params = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    states: dict[Any, Any] = {}
    for number, state in packed["state"].items():
        fmt = optimizer._state_format(params[number])
        moments = {name: _decode(state, name, codec, fmt.group_size) for name, codec in moment_codecs(fmt)}
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

    saved_groups = state_dict["param_groups"]
    owners = {
        number: (param, saved)
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True)
        for param, number in zip(group["params"], saved["params"], strict=True)
    }
    orphans = [number for number in state_dict["state"] if number not in owners]
    if orphans:
        raise ValueError(f"state of parameters {orphans[:5]} belongs to none of the param groups; the state dict is truncated or foreign")
    states = {
        owners[number][0]: _read_state(optimizer, number, saved, *owners[number]) for number, saved in state_dict["state"].items() if saved
    }
    groups = [_read_group(live, saved) for live, saved in zip(optimizer.param_groups, saved_groups, strict=True)]

    optimizer.__setstate__({"state": defaultdict(dict, states), "param_groups": groups})
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
    if FORMAT_KEY not in saved:
        values.pop("decoupled_weight_decay", None)
        for key in ("foreach", "fused", "capturable", "differentiable"):
            values.pop(key, None)
    return {**live, **values, "params": live["params"]}


def _read_state(
    optimizer: LowBitOptimizer, number: Any, saved: dict[str, Any], param: Tensor, saved_group: dict[str, Any]
) -> dict[str, Tensor]:
    """A fresh state of `param` filled from what was saved for parameter `number`."""
    if "max_exp_avg_sq" in saved:
        name = type(optimizer).__name__
        raise ValueError(f"parameter {number} has an amsgrad maximum, which {name} does not support; resume it with torch.optim.AdamW")
    fmt = optimizer._state_format(param)
    target = local(param)
    (state,) = allocate([target.shape], fmt, target.device)
    state["step"].copy_(torch.as_tensor(_entry(saved, "step", number), dtype=torch.float32))
    described = saved_group.get(FORMAT_KEY) or {}
    for name, codec in moment_codecs(fmt):
        value = _entry(saved, name, number)
        if tuple(value.shape) != tuple(target.shape):
            raise ValueError(f"{name} of parameter {number} has shape {tuple(value.shape)}; the parameter has {tuple(target.shape)}")
        if f"{name}_amax" in saved:
            _read_codes(state, saved, name, number, codec, fmt, described)
        elif not value.is_floating_point():
            raise ValueError(f"{name} of parameter {number} is {value.dtype} without {name}_amax; it is truncated, or of another library")
        elif codec.quantized:
            encoded = torch.ops.coat_kernels.quantize_group(
                value.to(target.device, torch.float32), codec.name, fmt.group_size, name == "exp_avg", "nearest", 0
            )
            for suffix, part in zip(("", "_amax", "_k16"), encoded, strict=True):
                state[name + suffix].copy_(part)
        else:
            state[name].copy_(value)
    _read_residual(state, saved, number, fmt)
    return state


def _read_codes(
    state: dict[str, Tensor], saved: dict[str, Any], name: str, number: Any, codec: Codec, fmt: StateFormat, described: dict[str, Any]
) -> None:
    """Copy codes byte for byte; where the optimizer keeps this tensor in float32, decode them."""
    want = {name: codec.name if codec.quantized else described.get(name), "group_size": fmt.group_size}
    got = {key: described.get(key) for key in want}
    if got != want or not described:
        raise ValueError(
            f"parameter {number} was saved as {got}, the optimizer keeps {want}; "
            "make the optimizer with the fp8_config it was saved with (m1_format, m2_format, use_dynamic_range_expansion, block_size)"
        )
    groups = num_groups(saved[name].numel(), fmt.group_size)
    parts = {"": (torch.uint8, tuple(saved[name].shape)), "_amax": (torch.float32, (groups,)), "_k16": (torch.uint8, (groups,))}
    for suffix, (dtype, shape) in parts.items():
        part = _entry(saved, name + suffix, number)
        if part.dtype != dtype or tuple(part.shape) != shape:
            raise ValueError(
                f"{name + suffix} of parameter {number} is {part.dtype} of shape {tuple(part.shape)}; {dtype} of shape {shape} is needed: "
                "it is truncated, or was cast on the way"
            )
    if groups and int(saved[f"{name}_k16"].min()) == 0:
        raise ValueError(f"{name}_k16 of parameter {number} holds a 0, which no encoder writes; the state dict is damaged")
    if codec.quantized:
        for suffix in parts:
            state[name + suffix].copy_(saved[name + suffix])
    else:
        state[name].copy_(_decode(saved, name, get_codec(described[name]), fmt.group_size))


def _read_residual(state: dict[str, Tensor], saved: dict[str, Any], number: Any, fmt: StateFormat) -> None:
    residual = saved.get("residual")
    if fmt.param_rounding != "split":
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
            f"state of parameter {number} has no {key!r}, only {sorted(map(str, saved))}; it is truncated, or saved neither by this "
            "optimizer nor by torch.optim.AdamW"
        ) from None


def _decode(state: dict[str, Any], name: str, codec: Codec, group_size: int) -> Tensor:
    """A moment in float32."""
    if not codec.quantized:
        return state[name].to(torch.float32, copy=True)
    return torch.ops.coat_kernels.dequantize_group(
        state[name], state[f"{name}_amax"], state[f"{name}_k16"], codec.name, group_size, torch.float32
    )
