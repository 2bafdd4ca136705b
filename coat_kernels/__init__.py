"""Train on less memory with the optimizers and modules you know: low-precision states and activations for PyTorch."""

from ._native import CoatWarning
from .backends import BackendUnavailable, backends
from .ops.group_quant import GroupQuantized, dequantize_group, quantize_group

__version__ = "0.1.0"

__all__ = ["BackendUnavailable", "CoatWarning", "GroupQuantized", "__version__", "backends", "dequantize_group", "quantize_group"]
