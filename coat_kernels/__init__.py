"""Train on less memory with the optimizers and modules you know: low-precision states and activations for PyTorch."""

from ._native import CoatWarning
from .backends import BackendUnavailable, backends
from .ops.blockwise_quant import BlockwiseQuantized, dequantize_blockwise, quantize_blockwise
from .ops.group_quant import GroupQuantized, dequantize_group, quantize_group

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BlockwiseQuantized",
    "CoatWarning",
    "GroupQuantized",
    "__version__",
    "backends",
    "dequantize_blockwise",
    "dequantize_group",
    "quantize_blockwise",
    "quantize_group",
]
