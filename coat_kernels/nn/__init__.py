"""Drop-in `torch.nn` modules that save their activations in 8 bits, and the conversion of whole models to them."""

from ..autograd.checkpoint import MemoryEfficientCheckpoint
from ..autograd.saved import compress_saved_activations
from ..config import COATConfig
from .activation import FP8GELU, FP8SiLU, FP8SwiGLU
from .convert import convert_to_coat, replace_linear_with_fp8
from .linear import FP8Linear
from .norm import FP8AdaLayerNorm, FP8LayerNorm, FP8RMSNorm
from .report import ConversionReport, conversion_report

__all__ = [
    "FP8GELU",
    "COATConfig",
    "ConversionReport",
    "FP8AdaLayerNorm",
    "FP8LayerNorm",
    "FP8Linear",
    "FP8RMSNorm",
    "FP8SiLU",
    "FP8SwiGLU",
    "MemoryEfficientCheckpoint",
    "compress_saved_activations",
    "conversion_report",
    "convert_to_coat",
    "replace_linear_with_fp8",
]
