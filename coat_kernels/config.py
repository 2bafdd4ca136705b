"""Frozen settings that users pass and trainers read."""

from __future__ import annotations

from dataclasses import dataclass

from .formats import FORMATS, ROUNDINGS, check_group_size, codec_name, get_codec
from .formats.codecs import Codec

_M1_FORMATS = ("e4m3", "e5m2", "softsign8", "e2m1", "bfloat16", "float32")
_M2_FORMATS = ("e4m3", "e5m2", "log8", "e2m1", "bfloat16", "float32")
#: Their steps are wider than what a second moment moves in one step at beta2 = 0.999: rounded to nearest it stalls.
_STALLING = ("log8", "bfloat16")


@dataclass(frozen=True)
class FP8QuantizationConfig:
    """How an optimizer keeps its two moments.

    Args:
        use_fp8_m1: quantize the first moment; False keeps it in float32.
        use_fp8_m2: the same for the second moment.
        m1_format: "e4m3", "e5m2", "softsign8" (dense near zero), "e2m1" (4 bits), "bfloat16" or "float32".
        m2_format: "e4m3", "e5m2", "log8" (256 values uniform in log2, the most accurate in 8 bits), "e2m1" (4 bits), "bfloat16" or
            "float32".
        block_size: elements a group: 32, 64, 128 or 256.
        use_dynamic_range_expansion: |x|^k per group before encoding e4m3, e5m2 and e2m1 (COAT, arXiv 2410.19313). A first moment in
            e2m1 is never expanded: seven magnitudes over many octaves put its updates off by 8.7 times their size, unexpanded by 0.37.
        m1_rounding: "nearest" or "stochastic".
        m2_rounding: the same; None means "stochastic" for log8 and bfloat16 (a slow moving average stalls otherwise), else "nearest".

    Raises:
        ValueError: an unknown format or rounding, a group size that is not offered, a format of the other moment.
    """

    use_fp8_m1: bool = True
    use_fp8_m2: bool = True
    m1_format: str = "e4m3"
    m2_format: str = "e4m3"
    block_size: int = 128
    use_dynamic_range_expansion: bool = True
    m1_rounding: str = "nearest"
    m2_rounding: str | None = None

    def __post_init__(self) -> None:
        for field in ("use_fp8_m1", "use_fp8_m2", "use_dynamic_range_expansion"):
            value = getattr(self, field)
            if not isinstance(value, bool):
                raise TypeError(f"{field} must be True or False, got {value!r}")
        if self.m1_format == "log8":
            raise ValueError("m1_format='log8' cannot hold the signed first moment; use 'softsign8' or 'e4m3' (log8 serves m2_format)")
        if self.m2_format == "softsign8":
            raise ValueError("m2_format='softsign8' is too narrow for second moments; use 'log8' or 'e4m3' (softsign8 serves m1_format)")
        for field, formats in (("m1_format", _M1_FORMATS), ("m2_format", _M2_FORMATS)):
            if getattr(self, field) not in formats:
                raise ValueError(f"unknown {field} {getattr(self, field)!r}; known formats: {', '.join(formats)}")
        for field in ("m1_rounding", "m2_rounding"):
            if getattr(self, field) not in (*ROUNDINGS, None) or (field == "m1_rounding" and self.m1_rounding is None):
                raise ValueError(f"unknown {field} {getattr(self, field)!r}; choose 'nearest' or 'stochastic'")
        check_group_size(self.block_size)

    @classmethod
    def recommended(cls) -> FP8QuantizationConfig:
        """`log8` for the second moment, the rest as COAT: the same bytes, and updates half as far from float32's (docs/codecs.md)."""
        return cls(m2_format="log8")

    @property
    def exp_avg_codec(self) -> Codec:
        expand = self.use_dynamic_range_expansion and self.m1_format != "e2m1"
        return _codec(self.m1_format, expand) if self.use_fp8_m1 else get_codec("float32")

    @property
    def exp_avg_sq_codec(self) -> Codec:
        return _codec(self.m2_format, self.use_dynamic_range_expansion) if self.use_fp8_m2 else get_codec("float32")

    @property
    def exp_avg_sq_rounding(self) -> str:
        return self.m2_rounding or ("stochastic" if self.m2_format in _STALLING else "nearest")


def _codec(fmt: str, expand: bool) -> Codec:
    return get_codec(codec_name(fmt, expand) if fmt in FORMATS else fmt)
