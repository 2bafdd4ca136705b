"""Drop-in `torch.optim` replacements whose states are stored in 8 bits."""

from ..config import FP8QuantizationConfig
from .adamw_8bit import AdamW8bit
from .came_8bit import CAME8bit
from .cameamp import (
    Automagic_CameAMP_Improved_8Bit,
    AutomagicCameAMP,
    CameAMPBalanced,
    CameAMPMemoryOptimized,
    CameAMPQualityOptimized,
    create_improved_8bit_optimizer,
)
from .cameamp_config import Improved8BitOptimizerConfig
from .fp8_adamw import FP8AdamW
from .lion_8bit import Lion8bit
from .muon_8bit import Muon8bit

__all__ = [
    "AdamW8bit",
    "AutomagicCameAMP",
    "Automagic_CameAMP_Improved_8Bit",
    "CAME8bit",
    "CameAMPBalanced",
    "CameAMPMemoryOptimized",
    "CameAMPQualityOptimized",
    "FP8AdamW",
    "FP8QuantizationConfig",
    "Improved8BitOptimizerConfig",
    "Lion8bit",
    "Muon8bit",
    "create_improved_8bit_optimizer",
]
