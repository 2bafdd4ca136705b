"""The table of state codecs: the constants that `README.md` beside this file gives meaning to.

Nothing outside `formats/` (and its C++ twin `csrc/formats`) knows a format's range or code layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

GROUP_SIZES = (32, 64, 128, 256)
ROUNDINGS = ("nearest", "stochastic")
FORMATS = ("e4m3", "e5m2", "log8")

#: Streams of the counter-based generator: what a random number is drawn for.
STREAM_EXP_AVG, STREAM_EXP_AVG_SQ, STREAM_PARAM = 0, 1, 2


@dataclass(frozen=True)
class Codec:
    """How one state's bytes mean numbers.

    Args:
        name: the name ops and state dicts carry.
        index: the number kernels know it by.
        mantissa_bits: of the FP8 code; 0 where the code is no float.
        bias: exponent bias of the FP8 code.
        max_code: the code of the largest finite magnitude.
        expand: dynamic range expansion, |x|^k per group.
    """

    name: str
    index: int
    mantissa_bits: int = 0
    bias: int = 0
    max_code: int = 0
    expand: bool = False

    @property
    def is_float8(self) -> bool:
        return self.bias > 0

    @property
    def quantized(self) -> bool:
        """Whether values are one-byte codes with group metadata (`float32` is a pass-through)."""
        return self.name != "float32"

    @property
    def blockwise(self) -> bool:
        """Whether a block has one scale and a fixed map of 256 values (`dynamic8`), not a group's metadata."""
        return self.name == "dynamic8"

    @property
    def array_dtype(self) -> torch.dtype:
        """Of the array that stores a tensor's values or codes."""
        return torch.uint8 if self.quantized else torch.float32

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of that array for a tensor of `shape`."""
        return shape

    @property
    def signed(self) -> bool:
        """Whether negative values can be stored."""
        return self.name != "log8"

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

    `log8` adapts to a group's range by itself: `expand` does not apply to it.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known formats: {', '.join(FORMATS)}")
    return f"{fmt}_expand" if expand and fmt != "log8" else fmt


def check_group_size(group_size: int) -> int:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group size {group_size!r} is not offered; choose one of {', '.join(map(str, GROUP_SIZES))}")
    return group_size


def check_rounding(rounding: str) -> str:
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; choose 'nearest' or 'stochastic'")
    return rounding


def num_groups(numel: int, group_size: int) -> int:
    return -(-numel // group_size)
