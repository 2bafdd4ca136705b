"""The table of state codecs: the constants that `README.md` beside this file gives meaning to.

Nothing outside `formats/` (and its C++ twin `csrc/formats`) knows a format's range or code layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROUP_SIZES = (32, 64, 128, 256)
ROUNDINGS = ("nearest", "stochastic")
#: What `quantize_group` offers; the second moment has no use for signs, nor the first for log8.
FORMATS = ("e4m3", "e5m2", "log8", "softsign8", "e2m1")
#: Formats whose codes follow a group's range by themselves: dynamic range expansion does not apply to them.
_UNEXPANDED = ("log8", "softsign8")

#: Streams of the counter-based generator: what a random number is drawn for.
STREAM_EXP_AVG, STREAM_EXP_AVG_SQ, STREAM_PARAM = 0, 1, 2


@dataclass(frozen=True)
class Codec:
    """How one state's bytes mean numbers.

    Args:
        name: the name ops and state dicts carry.
        index: the number kernels know it by.
        mantissa_bits: of the code as a small float; 0 where the code is no float.
        bias: exponent bias of the code as a small float.
        max_code: the code of the largest finite magnitude.
        expand: dynamic range expansion, |x|^k per group.
        bits: of a code; two codes of 4 bits share a byte.
    """

    name: str
    index: int
    mantissa_bits: int = 0
    bias: int = 0
    max_code: int = 0
    expand: bool = False
    bits: int = 8

    @property
    def is_float(self) -> bool:
        """Whether codes are small floats: e4m3, e5m2, e2m1."""
        return self.bias > 0

    @property
    def is_float8(self) -> bool:
        return self.is_float and self.bits == 8

    @property
    def quantized(self) -> bool:
        """Whether values are codes with metadata (`float32` and `bfloat16` are passed through)."""
        return self.name not in ("float32", "bfloat16")

    @property
    def blockwise(self) -> bool:
        """Whether a block has one scale and a fixed map of 256 values (`dynamic8`), not a group's metadata."""
        return self.name == "dynamic8"

    @property
    def signed(self) -> bool:
        """Whether negative values can be stored."""
        return self.name != "log8"

    @property
    def holds_squares(self) -> bool:
        """Whether second moments can be stored. `softsign8` reaches 8 octaves under amax and a second moment spans 20 and more."""
        return self.name != "softsign8"

    @property
    def nan_code(self) -> int:
        """The code of a non-finite element: 0 where the codec has none of its own."""
        return NAN_CODE if self.is_float8 else 0

    @property
    def sign_bit(self) -> int:
        """Of a code as a small float."""
        return 1 << (self.bits - 1)

    @property
    def array_dtype(self) -> torch.dtype:
        """Of the array that holds a tensor's codes or values."""
        return torch.uint8 if self.quantized else torch.bfloat16 if self.name == "bfloat16" else torch.float32

    def codes_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the array that holds the codes or values of a tensor of this shape: its own, or flat where codes share bytes."""
        return tuple(shape) if self.bits == 8 else (-(-math.prod(shape) // 2),)

    @property
    def max(self) -> float:
        """Largest finite code value."""
        mantissa = self.max_code & ((1 << self.mantissa_bits) - 1)
        exponent = self.max_code >> self.mantissa_bits
        return (1.0 + mantissa / (1 << self.mantissa_bits)) * 2.0 ** (exponent - self.bias)

    @property
    def min_subnormal(self) -> float:
        """Smallest non-zero code value."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def range_q15(self) -> int:
        """16 times the octaves the expansion fills, in units of 2^-15: numerator of k16."""
        return math.floor(16 * math.log2(self.max / (2 * self.min_subnormal)) * (1 << 15))


NAN_CODE = 0x7F
#: Groups wider than this many octaves are cut, so that one dying element does not coarsen its neighbours.
MAX_OCTAVES = 32
#: The most by which D understates a group's range (0.0861 octave), in units of 2^-11 octave, rounded up.
LOG2_SLACK_Q11 = 178

_CODECS = (
    Codec("float32", 0),
    Codec("e4m3", 1, mantissa_bits=3, bias=7, max_code=0x7E),
    Codec("e4m3_expand", 2, mantissa_bits=3, bias=7, max_code=0x7E, expand=True),
    Codec("e5m2", 3, mantissa_bits=2, bias=15, max_code=0x7B),
    Codec("e5m2_expand", 4, mantissa_bits=2, bias=15, max_code=0x7B, expand=True),
    Codec("log8", 5, max_code=255),
    Codec("dynamic8", 6, max_code=255),
    Codec("softsign8", 7, max_code=127),
    Codec("e2m1", 8, mantissa_bits=1, bias=1, max_code=7, bits=4),
    Codec("e2m1_expand", 9, mantissa_bits=1, bias=1, max_code=7, expand=True, bits=4),
    Codec("bfloat16", 10),
)
CODECS = {codec.name: codec for codec in _CODECS}


def get_codec(name: str) -> Codec:
    """The codec called `name`; `ValueError` names the known ones."""
    try:
        return CODECS[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown codec {name!r}; known codecs: {', '.join(CODECS)}") from None


def codec_name(fmt: str, expand: bool) -> str:
    """Name of the codec for a user's format name and expansion switch.

    `log8` and `softsign8` are scaled to a group by themselves: `expand` does not apply to them.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known formats: {', '.join(FORMATS)}")
    return f"{fmt}_expand" if expand and fmt not in _UNEXPANDED else fmt


def check_group_size(group_size: int, offered: Sequence[int] = GROUP_SIZES) -> int:
    if group_size not in offered:
        raise ValueError(f"group size {group_size!r} is not offered; choose one of {', '.join(map(str, offered))}")
    return group_size


def check_rounding(rounding: str) -> str:
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; choose 'nearest' or 'stochastic'")
    return rounding


def num_groups(numel: int, group_size: int) -> int:
    return -(-numel // group_size)
