"""Drop-in `torch.optim` replacements whose states are stored in 8 bits."""

from ..config import FP8QuantizationConfig
from .adamw_8bit import AdamW8bit
from .fp8_adamw import FP8AdamW
from .lion_8bit import Lion8bit
from .muon_8bit import Muon8bit

__all__ = ["AdamW8bit", "FP8AdamW", "FP8QuantizationConfig", "Lion8bit", "Muon8bit"]
