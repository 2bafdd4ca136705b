"""Frozen settings that users pass and trainers read."""

from __future__ import annotations

from dataclasses import dataclass

from .formats import FORMATS, ROUNDINGS, check_group_size, codec_name, get_codec
from .formats.codecs import Codec


@dataclass(frozen=True)
class FP8QuantizationConfig:
    """How an optimizer keeps its two moments.

    Args:
        use_fp8_m1: quantize the first moment; False keeps it in float32.
        use_fp8_m2: the same for the second moment.
        m1_format: "e4m3" or "e5m2".
        m2_format: "e4m3", "e5m2" or "log8" (256 values uniform in log2, the most accurate for second moments).
        block_size: elements a group: 32, 64, 128 or 256.
        use_dynamic_range_expansion: |x|^k per group before encoding (COAT, arXiv 2410.19313); `log8` adapts by itself.
        m1_rounding: "nearest" or "stochastic".
        m2_rounding: the same; None means "stochastic" for `log8` (its moving average stalls otherwise) and "nearest" for FP8.

    Raises:
        ValueError: an unknown format or rounding, a group size that is not offered, `log8` for the signed first moment.
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
        for field in ("m1_format", "m2_format"):
            if getattr(self, field) not in FORMATS:
                raise ValueError(f"unknown {field} {getattr(self, field)!r}; known formats: {', '.join(FORMATS)}")
        if self.m1_format == "log8":
            raise ValueError("m1_format='log8' cannot hold the signed first moment; use 'e4m3' or 'e5m2' (log8 serves m2_format)")
        for field in ("m1_rounding", "m2_rounding"):
            if getattr(self, field) not in (*ROUNDINGS, None) or (field == "m1_rounding" and self.m1_rounding is None):
                raise ValueError(f"unknown {field} {getattr(self, field)!r}; choose 'nearest' or 'stochastic'")
        check_group_size(self.block_size)

    @property
    def exp_avg_codec(self) -> Codec:
        return get_codec(codec_name(self.m1_format, self.use_dynamic_range_expansion) if self.use_fp8_m1 else "float32")

    @property
    def exp_avg_sq_codec(self) -> Codec:
        return get_codec(codec_name(self.m2_format, self.use_dynamic_range_expansion) if self.use_fp8_m2 else "float32")

    @property
    def exp_avg_sq_rounding(self) -> str:
        return self.m2_rounding or ("stochastic" if self.m2_format == "log8" else "nearest")
