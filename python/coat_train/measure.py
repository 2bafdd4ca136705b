"""What an optimizer's state really takes, counted over its tensors."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def state_bytes_per_parameter(optimizer: Optimizer) -> float:
    """Bytes of all state tensors, moments, metadata and step counts, over the number of parameters."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / sum(p.numel() for p in _parameters(optimizer))


def quantized_share(optimizer: Optimizer) -> float:
    """Share, 0 .. 1, of the elements of both moments that are kept in one byte."""
    moments = [state[name] for state in optimizer.state.values() for name in MOMENTS]
    return sum(m.numel() for m in moments if m.element_size() == 1) / sum(m.numel() for m in moments)
