"""The ways to keep a moment between two steps that the table compares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coat_kernels.formats import dynamic8
from coat_kernels.formats.codecs import CODECS, STREAM_EXP_AVG, STREAM_EXP_AVG_SQ
from coat_kernels.formats.random import stream_key
from coat_kernels.formats.reference import decode_group, encode_group, round_bfloat16
from coat_kernels.ops.state import Moment

GROUP_SIZES = (32, 64, 128, 256)
#: Of what is measured at one group size alone, and of the tables that show one.
DEFAULT_GROUP_SIZE = 128


_FLOAT8 = ("e4m3", "e4m3_expand", "e5m2", "e5m2_expand")
#: Slow to dither in the reference: one group size shows what stochastic rounding does.
_DITHERED_ONCE = ("e4m3", "e5m2", "e5m2_expand", "e2m1_expand")


@dataclass(frozen=True)
class Store:
    """One way to keep one moment.

    Args:
        codec: name in the package's table.
        signed: first moment or second.
        rounding: "nearest" or "stochastic".
        flushes: a non-zero second moment may take the code of zero, which no codec of the package lets happen in a step: a control.
    """

    codec: str
    signed: bool
    rounding: str = "nearest"
    flushes: bool = False

    @property
    def name(self) -> str:
        return self.codec + (", stochastic" if self.rounding == "stochastic" else "") + (", flushes" if self.flushes else "")

    @property
    def grouped(self) -> bool:
        """Whether a group size plays a part."""
        return self.codec not in ("float32", "bfloat16")

    def offered(self, group_size: int) -> bool:
        """Whether it is measured at this group size."""
        if self.flushes or (self.rounding == "stochastic" and self.codec in _DITHERED_ONCE):
            return group_size == DEFAULT_GROUP_SIZE
        return self.codec != "dynamic8" or group_size in dynamic8.BLOCK_SIZES

    def bytes_per_element(self, group_size: int) -> float:
        """Codes and metadata of one moment, from the declaration that optimizers allocate by."""
        shape = torch.Size((1 << 16,))
        parts = Moment("moment", CODECS[self.codec], group_size, self.signed).parts(shape)
        return sum(dtype.itemsize * math.prod(part) for dtype, part in parts.values()) / shape.numel()

    def carried(self, x: Tensor, group_size: int, step: int) -> Tensor:
        """What the next step reads of `x` (float32, flat; a multiple of the group size)."""
        if self.codec == "float32":
            return x
        stream = STREAM_EXP_AVG if self.signed else STREAM_EXP_AVG_SQ
        key = stream_key(0, step, 0, stream) if self.rounding == "stochastic" else 0
        if self.codec == "bfloat16":
            return round_bfloat16(x, self.rounding, key).to(torch.float32)
        if self.codec == "dynamic8":
            codes, absmax = dynamic8.encode_blocks(x, group_size, signed=self.signed, keep_nonzero=not (self.signed or self.flushes))
            return dynamic8.decode_blocks(codes, absmax, group_size, signed=self.signed)
        codec = CODECS[self.codec]
        # the reference keeps a non-zero value from zero where it is told that it has no sign
        encoded = encode_group(x, codec, group_size, signed=self.signed or self.flushes, rounding=self.rounding, key=key)
        return decode_group(*encoded, codec, group_size)


FIRST = (
    *(Store(codec, True) for codec in ("float32", "bfloat16", *_FLOAT8, "softsign8", "e2m1", "e2m1_expand", "dynamic8")),
    Store("softsign8", True, "stochastic"),
)
SECOND = (
    Store("float32", False),
    *(Store(codec, False, rounding) for codec in ("bfloat16", *_FLOAT8, "e2m1_expand", "log8") for rounding in ("nearest", "stochastic")),
    Store("dynamic8", False),
    *(Store(codec, False, flushes=True) for codec in ("e4m3", "dynamic8")),
)
