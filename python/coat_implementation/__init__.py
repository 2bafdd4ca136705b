"""The names of users' COAT guides, each from where it lives in coat_kernels and coat_train."""

from coat_train.quantizers import (
    DynamicRangeExpansion,
    FP8ActivationQuantizer,
    FP8LinearWrapper,
    FP8PrecisionFlow,
    FP8Quantizer,
    replace_linear_with_fp8,
)
from coat_train.trainer import COATTrainer, create_coat_trainer_for_flux_lora

from coat_kernels.config import COATConfig, FP8QuantizationConfig
from coat_kernels.nn import MemoryEfficientCheckpoint
from coat_kernels.optim import FP8AdamW

__all__ = [
    "COATConfig",
    "COATTrainer",
    "DynamicRangeExpansion",
    "FP8ActivationQuantizer",
    "FP8AdamW",
    "FP8LinearWrapper",
    "FP8PrecisionFlow",
    "FP8QuantizationConfig",
    "FP8Quantizer",
    "MemoryEfficientCheckpoint",
    "create_coat_trainer_for_flux_lora",
    "replace_linear_with_fp8",
]
