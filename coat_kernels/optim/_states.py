"""Where the stored state of an optimizer lives: allocation in one arena, and the interleaved metadata that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import num_groups
from ..ops.adamw_fp8 import StateFormat

MOMENTS = ("exp_avg", "exp_avg_sq")

_ALIGN = 16  # bytes: what 128-bit loads need


def moment_codecs(fmt: StateFormat) -> tuple[tuple[str, Any], ...]:
    """(state name, codec) of the two moments."""
    return tuple(zip(MOMENTS, (fmt.exp_avg, fmt.exp_avg_sq), strict=True))


def _sections(shape: torch.Size, fmt: StateFormat) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of the arrays behind one tensor's state; amax and k16 serve both moments."""
    groups = num_groups(shape.numel(), fmt.group_size)
    sections: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name, codec in moment_codecs(fmt):
        sections.append((name, torch.uint8 if codec.quantized else torch.float32, tuple(shape)))
    if fmt.quantized:
        sections += [("amax", torch.float32, (groups, 2)), ("k16", torch.uint8, (groups, 2))]
    if fmt.param_rounding == "split":
        sections.append(("residual", torch.int8, tuple(shape)))
    return sections


def allocate(shapes: Sequence[torch.Size], fmt: StateFormat, device: torch.device) -> list[dict[str, Tensor]]:
    """Fresh state (all moments zero, step 0) of tensors with these shapes.

    All of it is cut from one byte arena: 1,000 adapters cost one allocation, not 6,000. Metadata comes out as one column view
    a moment (`exp_avg_amax`, `exp_avg_k16`, ...) of an array that interleaves both.
    """
    plan, total = [], 0
    for shape in shapes:
        for name, dtype, dims in _sections(shape, fmt):
            nbytes = torch.Size(dims).numel() * dtype.itemsize
            plan.append((name, dtype, dims, total, nbytes))
            total += -(-nbytes // _ALIGN) * _ALIGN
    arena = torch.zeros(total, dtype=torch.uint8, device=device)
    steps = torch.zeros(len(shapes), device=device)
    states: list[dict[str, Tensor]] = []
    sections = iter(plan)
    for row, shape in enumerate(shapes):
        state = {"step": steps[row]}
        for _ in _sections(shape, fmt):
            name, dtype, dims, offset, nbytes = next(sections)
            array = arena[offset : offset + nbytes].view(dtype).view(dims)
            if name not in ("amax", "k16"):
                state[name] = array
                continue
            if name == "k16":
                array.fill_(16)
            state.update({f"{moment}_{name}": array[:, i] for i, (moment, codec) in enumerate(moment_codecs(fmt)) if codec.quantized})
        states.append(state)
    return states


def interleaved(state: dict[str, Tensor], name: str, fmt: StateFormat) -> Tensor:
    """[n_groups, 2] array behind the `amax` or `k16` columns of a state.

    Columns that were replaced (moved between devices, say) are gathered into a new array and the state is pointed at it.
    """
    columns = {i: state[f"{moment}_{name}"] for i, (moment, codec) in enumerate(moment_codecs(fmt)) if codec.quantized}
    position, column = next(iter(columns.items()))
    groups = column.numel()
    if column.stride() == (2,) and column.storage_offset() >= position:
        array = column.as_strided((groups, 2), (2, 1), column.storage_offset() - position)
        if all(array[:, i].data_ptr() == tensor.data_ptr() and tensor.stride() == (2,) for i, tensor in columns.items()):
            return array
    array = torch.full((groups, 2), 16 if name == "k16" else 0, dtype=column.dtype, device=column.device)
    for i, tensor in columns.items():
        array[:, i] = tensor
        state[f"{MOMENTS[i]}_{name}"] = array[:, i]
    return array
