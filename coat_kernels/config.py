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


_ACTIVATION_FORMATS = ("e4m3", "e5m2", "int8", "auto")
_ACTIVATION_GROUPS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class COATConfig:
    """What a model's conversion and its trainer do.

    Args:
        use_fp8_optimizer: 8-bit moments (`to_fp8_quant_config`).
        optimizer_m1_format, optimizer_m2_format, optimizer_block_size, use_dynamic_range_expansion: as in `FP8QuantizationConfig`.
        use_fp8_activation: convert the model's linears, norms and activation functions (`convert_to_coat`).
        activation_linear_granularity: scale of what a trainable linear saves and an FP8 product reads: "per_tensor" or "per_row".
        activation_nonlinear_granularity: of what norms and activation functions save: "per_group", 1 x `activation_group_size`
            along the last dimension.
        activation_group_size: 16, 32, 64, 128 or 256.
        enable_memory_efficient_checkpoint: trainers checkpoint blocks with boundaries in 8 bits where the model offers checkpointing.
        log_memory_stats: trainers log the memory of each phase of a step.
        activation_format: of norms and activation functions: "e4m3", "e5m2", "int8", or "auto" (per group the better of e4m3 and int8).
        attention_format: None keeps what attention saves in the model's dtype; a format of `activation_format` stores it in 8 bits.
        attention_group_size: of `attention_format`.
        frozen_weight_format: "e4m3" stores the weights of frozen linear layers in FP8; None leaves them. Codes and scale are plain
            attributes: `module.to` moves them, but FSDP2 leaves them whole on every rank, and offloading that walks `parameters()` leaves
            them where they are.
        frozen_weight_granularity: their scale: "per_tensor" or "per_channel" (output channel).

        use_fp8_products: linear layers multiply in FP8 on GPUs that can (compute capability 8.9 and later): faster, and every product
            then has FP8's error, 25 to 30 dB. False multiplies in the model's dtype everywhere; FP8 is how tensors are stored.

    Raises:
        ValueError: an unknown format or granularity, a group size that is not offered.
        TypeError: a switch that is not a bool.
    """

    use_fp8_optimizer: bool = True
    optimizer_m1_format: str = "e4m3"
    optimizer_m2_format: str = "e4m3"
    optimizer_block_size: int = 128
    use_dynamic_range_expansion: bool = True
    use_fp8_activation: bool = True
    activation_linear_granularity: str = "per_tensor"
    activation_nonlinear_granularity: str = "per_group"
    activation_group_size: int = 128
    enable_memory_efficient_checkpoint: bool = True
    log_memory_stats: bool = True
    activation_format: str = "e4m3"
    attention_format: str | None = None
    attention_group_size: int = 32
    frozen_weight_format: str | None = None
    frozen_weight_granularity: str = "per_tensor"
    use_fp8_products: bool = True

    def __post_init__(self) -> None:
        switches = ("use_fp8_optimizer", "use_fp8_activation", "use_fp8_products", "enable_memory_efficient_checkpoint", "log_memory_stats")
        for field in switches:
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field} must be True or False, got {getattr(self, field)!r}")
        choices: dict[str, tuple[object, ...]] = {
            "activation_linear_granularity": ("per_tensor", "per_row"),
            "activation_nonlinear_granularity": ("per_group",),
            "activation_group_size": _ACTIVATION_GROUPS,
            "activation_format": _ACTIVATION_FORMATS,
            "attention_format": (None, *_ACTIVATION_FORMATS),
            "attention_group_size": _ACTIVATION_GROUPS,
            "frozen_weight_format": (None, "e4m3"),
            "frozen_weight_granularity": ("per_tensor", "per_channel"),
        }
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(f"unknown {field} {getattr(self, field)!r}; choose {', '.join(map(repr, known))}")
        self.to_fp8_quant_config()

    def to_fp8_quant_config(self) -> FP8QuantizationConfig:
        """The optimizer's part, for `FP8AdamW(fp8_config=...)`; `use_fp8_optimizer=False` gives float32 moments."""
        return FP8QuantizationConfig(
            use_fp8_m1=self.use_fp8_optimizer,
            use_fp8_m2=self.use_fp8_optimizer,
            m1_format=self.optimizer_m1_format,
            m2_format=self.optimizer_m2_format,
            block_size=self.optimizer_block_size,
            use_dynamic_range_expansion=self.use_dynamic_range_expansion,
        )
