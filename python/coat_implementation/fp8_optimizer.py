"""The optimizer's names, under the module path that guides show."""

from . import DynamicRangeExpansion, FP8AdamW, FP8QuantizationConfig, FP8Quantizer

__all__ = ["DynamicRangeExpansion", "FP8AdamW", "FP8QuantizationConfig", "FP8Quantizer"]
