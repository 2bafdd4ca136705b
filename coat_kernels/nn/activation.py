"""Activation functions that save their input in 8 bits."""

from __future__ import annotations

from torch import Tensor, nn

from ..autograd.activation import gated, gelu, silu, swiglu
from ..config import COATConfig
from ._swap import Saving8Bit, Unconvertible, swap


class FP8GELU(Saving8Bit, nn.GELU):
    """`torch.nn.GELU` that saves its input in 8 bits.

    Args:
        approximate: "none" or "tanh".
        config: `COATConfig`: `activation_format` and `activation_group_size`.
    """

    def __init__(self, approximate: str = "none", *, config: COATConfig | None = None) -> None:
        super().__init__(approximate)
        self.coat_config = config or COATConfig()

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, self.approximate, **self._format)


class FP8SiLU(Saving8Bit, nn.SiLU):
    """`torch.nn.SiLU` that saves its input in 8 bits.

    Args:
        config: `COATConfig`: `activation_format` and `activation_group_size`.
    """

    def __init__(self, *, config: COATConfig | None = None) -> None:
        super().__init__()
        self.coat_config = config or COATConfig()

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, **self._format)


class FP8SwiGLU(Saving8Bit, nn.Module):
    """silu(gate) · up that saves gate and up in 8 bits and neither of the products.

    Args:
        gate_first: which half is the gate where both come in one tensor.
        config: `COATConfig`: `activation_format` and `activation_group_size`.
    """

    def __init__(self, gate_first: bool = True, *, config: COATConfig | None = None) -> None:
        super().__init__()
        self.gate_first = gate_first
        self.coat_config = config or COATConfig()

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """gate and up [..., I]; or one tensor [..., 2I] that holds both. The result is [..., I]."""
        if up is None:
            return gated(gate, "silu", gate_first=self.gate_first, **self._format)
        return swiglu(gate, up, **self._format)

    def extra_repr(self) -> str:
        return f"gate_first={self.gate_first}"


class GELUForward(Saving8Bit):
    """Of transformers' GELU modules."""

    coat_approximate: str

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, self.coat_approximate, **self._format)


class SiLUForward(Saving8Bit):
    """Of transformers' SiLU module."""

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, **self._format)


def convert_gelu(module: nn.Module, config: COATConfig) -> str:
    swap(module, FP8GELU, config)
    return "FP8GELU"


def convert_silu(module: nn.Module, config: COATConfig) -> str:
    if module.inplace:
        raise Unconvertible("it overwrites its input")
    swap(module, FP8SiLU, config)
    return "FP8SiLU"
