"""Where the stored state of an optimizer lives: one arena for all tensors that are allocated together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.state import StepFormat

_ALIGN = 16  # bytes: what 128-bit loads need


def allocate(shapes: Sequence[torch.Size], fmt: StepFormat, device: torch.device) -> list[dict[str, Tensor]]:
    """Fresh state (as `fmt.arrays` fills it, step 0) of tensors with these shapes.

    All of it is cut from one byte arena: 1,000 adapters cost one allocation, not 6,000.
    """
    declared = [fmt.arrays(shape) for shape in shapes]
    sizes = [[torch.Size(array.shape).numel() * array.dtype.itemsize for array in arrays] for arrays in declared]
    total = sum(-(-size // _ALIGN) * _ALIGN for row in sizes for size in row)
    arena = torch.zeros(total, dtype=torch.uint8, device=device)
    steps = torch.zeros(len(shapes), device="cpu" if fmt.steps_on_host else device)
    states: list[dict[str, Tensor]] = []
    offset = 0
    for row, arrays in enumerate(declared):
        state = {"step": steps[row]}
        for array, size in zip(arrays, sizes[row], strict=True):
            tensor = arena[offset : offset + size].view(array.dtype).view(array.shape)
            offset += -(-size // _ALIGN) * _ALIGN
            if array.fill:
                tensor.fill_(array.fill)
            if array.columns is None:
                state[array.name] = tensor
            else:
                state.update({name: tensor[:, i] for i, name in enumerate(array.columns) if name is not None})
        states.append(state)
    return states
