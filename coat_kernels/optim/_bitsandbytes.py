"""The state dictionaries of bitsandbytes' 8-bit optimizers, in both directions (layout: bitsandbytes/optim/optimizer.py, 0.50).

Its `state1`, `absmax1`, `qmap1` (and 2) are our `exp_avg`, `exp_avg_absmax` and the signed dynamic map; blocks hold 256 elements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from ..formats import get_codec, num_groups
from ..formats.dynamic8 import qmap
from ._plan import local

if TYPE_CHECKING:
    from ._base import LowBitOptimizer

#: What a translated dictionary calls the optimizer that saved it.
NAME = "bitsandbytes"
_BLOCK_SIZE = 256
#: Its state_dict() hides codes from FSDP in a dictionary under this key; older versions do not.
_WRAPPED = "__bnb_optimizer_quant_state__"
_MOMENTS = (("1", "exp_avg", True), ("2", "exp_avg_sq", False))
_GROUP_KEYS = ("lr", "betas", "eps", "weight_decay", "params", "param_names", "initial_lr")


def translate(state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` under our names if it is bitsandbytes', else as it is.

    Raises:
        ValueError: a quantization map that is not the dynamic 8-bit map.
    """
    states = {number: _unwrapped(state) for number, state in state_dict["state"].items()}
    if not any("state1" in state for state in states.values()):
        return state_dict
    described = {
        **{"version": 1, "optimizer": NAME, "exp_avg": "dynamic8", "exp_avg_sq": "dynamic8"},
        "family": "adamw" if any("state2" in state for state in states.values()) else "lion",
        "group_size": _block_size(states.values()),
    }
    groups = [{**{k: v for k, v in group.items() if k in _GROUP_KEYS}, "state_format": described} for group in state_dict["param_groups"]]
    return {"state": {number: _read(number, state) for number, state in states.items()}, "param_groups": groups}


def _block_size(states: Iterable[dict[str, Any]]) -> int:
    """The size that explains all scales: 256, or the 2048 of releases before 0.44."""
    counts = [(state["state1"].numel(), state["absmax1"].numel()) for state in states if "absmax1" in state]
    for size in (_BLOCK_SIZE, 2048):
        if all(num_groups(numel, size) == scales for numel, scales in counts):
            return size
    return _BLOCK_SIZE


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in state.items() if k != _WRAPPED}, **state.get(_WRAPPED, {})}


def _read(number: Any, state: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = {"step": state.get("step", 0)}
    for digit, name, signed in _MOMENTS:
        if f"state{digit}" not in state:
            continue
        read[name] = state[f"state{digit}"]
        if f"absmax{digit}" not in state:
            continue
        read[f"{name}_absmax"] = state[f"absmax{digit}"]
        saved_map = state.get(f"qmap{digit}")
        if saved_map is None or not torch.equal(saved_map.to("cpu", torch.float32), qmap(signed)):
            kind = "signed" if signed else "unsigned"
            raise ValueError(
                f"qmap{digit} of parameter {number} is not bitsandbytes' {kind} dynamic map, so its codes cannot be read; decode the state "
                "with bitsandbytes.functional.dequantize_blockwise and load it as float32 exp_avg and exp_avg_sq"
            )
    return read


def export(optimizer: LowBitOptimizer) -> dict[str, Any]:
    """The optimizer's state as the bitsandbytes class of the same rule reads it; other block sizes are encoded anew.

    Residuals of param_rounding="split" stay behind: bitsandbytes goes on from the 16-bit weights.
    """
    packed = Optimizer.state_dict(optimizer)
    params = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    states: dict[Any, Any] = {}
    for number, state in packed["state"].items():
        param = params[number]
        shape = local(param).shape
        written: dict[str, Any] = {"step": int(state["step"])}
        fmt = optimizer._state_format(param, written["step"])
        for moment, (digit, _, signed) in zip(fmt.moments, _MOMENTS, strict=False):
            if not moment.codec.quantized:
                written[f"state{digit}"] = state[moment.name].clone()
                continue
            target = replace(moment, codec=get_codec("dynamic8"), group_size=_BLOCK_SIZE)
            arrays = {"": state[moment.name], "_absmax": state[f"{moment.name}_absmax"]}
            if moment != target:
                arrays = target.encode(moment.decode(state, shape))
            written[f"state{digit}"] = arrays[""].clone()
            written[f"absmax{digit}"] = arrays["_absmax"].clone()
            written[f"qmap{digit}"] = qmap(signed).to(param.device)
        states[number] = written
    # its Lion keeps an eps too, which it does not read
    groups = [{"eps": 0.0, **{k: v for k, v in group.items() if k in _GROUP_KEYS}} for group in packed["param_groups"]]
    return {"state": states, "param_groups": groups}
