"""The activations' names, under the module path that guides show."""

from . import FP8ActivationQuantizer, FP8LinearWrapper, FP8PrecisionFlow, MemoryEfficientCheckpoint, replace_linear_with_fp8

__all__ = ["FP8ActivationQuantizer", "FP8LinearWrapper", "FP8PrecisionFlow", "MemoryEfficientCheckpoint", "replace_linear_with_fp8"]
