"""Train on less memory with the optimizers and modules you know: low-precision states and activations for PyTorch."""

from ._native import CoatWarning
from .backends import BackendUnavailable, backends
from .ops.activation_quant import ActivationQuantized, dequantize_activation, quantize_activation
from .ops.blockwise_quant import BlockwiseQuantized, dequantize_blockwise, quantize_blockwise
from .ops.group_quant import GroupQuantized, dequantize_group, quantize_group
from .ops.tensor_quant import TensorQuantized, dequantize_tensor, quantize_tensor

__version__ = "0.1.0"

__all__ = [
    "ActivationQuantized",
    "BackendUnavailable",
    "BlockwiseQuantized",
    "CoatWarning",
    "GroupQuantized",
    "TensorQuantized",
    "__version__",
    "backends",
    "dequantize_activation",
    "dequantize_blockwise",
    "dequantize_group",
    "dequantize_tensor",
    "quantize_activation",
    "quantize_blockwise",
    "quantize_group",
    "quantize_tensor",
]
