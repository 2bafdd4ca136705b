"""What an optimizer stores for one tensor, as a declaration. Allocation, saving, loading, conversion and accounting follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats import num_groups
from ..formats.codecs import Codec
from ..formats.reference import round_bfloat16


@dataclass(frozen=True)
class Array:
    """One array behind a tensor's state.

    Args:
        name: its key in the state, unless `columns` names its columns.
        dtype, shape: of the array.
        fill: what a fresh array holds.
        columns: the array is [rows, len(columns)] and a state shows each named column by itself; None leaves a column out.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: float = 0
    columns: tuple[str | None, ...] | None = None


@dataclass(frozen=True)
class Moment:
    """A state that holds one value an element of its parameter, encoded or not.

    Args:
        name: its key in the state; metadata lies beside it under the name and a suffix.
        codec: how values are stored.
        group_size: elements a group or block.
        signed: whether values may be negative.
    """

    name: str
    codec: Codec
    group_size: int
    signed: bool

    def parts(self, shape: torch.Size) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix -> dtype and shape of the arrays that a state dictionary shows for a tensor of this shape."""
        parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"": (self.codec.array_dtype, self.codec.codes_shape(tuple(shape)))}
        groups = (num_groups(shape.numel(), self.group_size),)
        if self.codec.blockwise:
            parts["_absmax"] = (torch.float32, groups)
        elif self.codec.quantized:
            parts |= {"_amax": (torch.float32, groups), "_k16": (torch.uint8, groups)}
        return parts

    def encode(self, value: Tensor) -> dict[str, Tensor]:
        """Suffix -> array of float32 `value`, rounded to nearest; a second moment that is not zero does not become zero."""
        if self.codec.blockwise:
            codes, absmax = torch.ops.coat_kernels.quantize_blockwise(value, self.group_size, self.signed)
            return {"": codes if self.signed else codes.clamp_(min=(value > 0).to(codes.dtype)), "_absmax": absmax}
        if self.codec.quantized:
            arrays = torch.ops.coat_kernels.quantize_group(value, self.codec.name, self.group_size, self.signed, "nearest", 0)
            return dict(zip(("", "_amax", "_k16"), arrays, strict=True))
        return {"": round_bfloat16(value) if self.codec.array_dtype == torch.bfloat16 else value.to(torch.float32)}

    def decode(self, state: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """float32 values of the arrays that `state` holds under this moment's names."""
        codes = state[self.name]
        if self.codec.blockwise:
            absmax = state[f"{self.name}_absmax"]
            value = torch.ops.coat_kernels.dequantize_blockwise(codes, absmax, self.group_size, self.signed, torch.float32)
        elif self.codec.quantized:
            amax, k16 = state[f"{self.name}_amax"], state[f"{self.name}_k16"]
            value = torch.ops.coat_kernels.dequantize_group(codes, amax, k16, self.codec.name, self.group_size, torch.float32, shape=shape)
        else:
            value = codes.to(torch.float32)
        return value.view(shape)


class StepFormat:
    """Base of the frozen dataclasses that say how a fused step stores its tensors' state; hashable, one for each launch."""

    #: Step counts live in host memory: for steps whose launches depend on them.
    steps_on_host: ClassVar[bool] = False

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The states that hold one value an element."""
        raise NotImplementedError

    def arrays(self, shape: torch.Size) -> list[Array]:
        """Everything that is allocated for one tensor, beside its step count."""
        raise NotImplementedError

    @property
    def quantized(self) -> bool:
        """Whether any moment is stored as codes."""
        return any(moment.codec.quantized for moment in self.moments)

    def describe(self) -> dict[str, Any]:
        """What a state dictionary records of the format: each moment's codec, and the group size."""
        codecs = {moment.name: moment.codec.name for moment in self.moments}
        return {**codecs, "group_size": self.moments[0].group_size}


def joined(state: dict[str, Tensor], array: Array) -> Tensor:
    """The array that a state holds, or that its column views share.

    Columns that were replaced (moved between devices, say) are gathered into a new array and the state is pointed at it.
    """
    if array.columns is None:
        return state[array.name]
    names = {i: name for i, name in enumerate(array.columns) if name is not None}
    width = len(array.columns)
    position, first = next(iter(names.items()))
    column = state[first]
    rows = column.numel()
    if column.stride() == (width,) and column.storage_offset() >= position:
        whole = column.as_strided((rows, width), (width, 1), column.storage_offset() - position)
        views = ((whole[:, i], state[name]) for i, name in names.items())
        if all(view.data_ptr() == held.data_ptr() and held.stride() == (width,) for view, held in views):
            return whole
    whole = torch.full((rows, width), array.fill, dtype=array.dtype, device=column.device)
    for i, name in names.items():
        whole[:, i] = state[name]
        state[name] = whole[:, i]
    return whole
