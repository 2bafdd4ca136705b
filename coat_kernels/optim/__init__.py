"""Drop-in optimizers: `torch.optim.Optimizer` subclasses with states in few bits."""

from ..config import FP8QuantizationConfig
from .fp8_adamw import FP8AdamW

__all__ = ["FP8AdamW", "FP8QuantizationConfig"]
