"""The forms that a work is trained in: what its network saves for the backward pass, and what its optimizer keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import AdamW, Optimizer

from coat_kernels import TensorQuantized, dequantize_tensor, quantize_tensor
from coat_kernels.autograd.saved import MIN_NUMEL
from coat_kernels.config import COATConfig
from coat_kernels.nn import convert_to_coat
from coat_kernels.optim import FP8AdamW

FLOAT32 = "float32"
#: The package's own: its `COATConfig` with this `activation_format`.
COAT = ("e4m3", "auto")
CONTROL = "control: E5M2 per tensor"
FORMS = (FLOAT32, *COAT, CONTROL)


def save_e5m2(network: nn.Module) -> None:
    """The control: everything that the network's forward pass saves in E5M2 with one scale a tensor, in place.

    Parameters and integers are left alone, and so are tensors as small as row statistics: a log-sum-exp in two mantissa bits would break
    the control rather than be told apart by its gradients.
    """
    forward = network.forward

    def packed(*args: Any, **kwargs: Any) -> Any:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

        def pack(tensor: Tensor) -> Tensor | tuple[TensorQuantized, torch.dtype]:
            own = tensor.untyped_storage().data_ptr() in parameters
            if own or not tensor.is_floating_point() or tensor.numel() < MIN_NUMEL:
                return tensor
            return quantize_tensor(tensor.detach(), "e5m2"), tensor.dtype

        with saved_tensors_hooks(pack, _unpack):
            return forward(*args, **kwargs)

    network.forward = packed


def _unpack(held: Tensor | tuple[TensorQuantized, torch.dtype]) -> Tensor:
    return held if isinstance(held, Tensor) else dequantize_tensor(held[0], held[1])


def convert(network: nn.Module, form: str) -> None:
    """Make a plain network one of a form, in place."""
    if form == CONTROL:
        save_e5m2(network)
    elif form != FLOAT32:
        convert_to_coat(network, COATConfig(activation_format=form))


def optimizer(network: nn.Module, form: str, lr: float, weight_decay: float) -> Optimizer:
    """Of a network's trainable parameters."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if form == FLOAT32:
        return AdamW(parameters, lr, weight_decay=weight_decay, fused=True)
    # half of the tensors of so small models lie under the default threshold: all of them are quantized
    return FP8AdamW(parameters, lr, weight_decay=weight_decay, min_quant_numel=0)
