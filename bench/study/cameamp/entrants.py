"""AdamW, the three profiles, and one of them with float32 states, which tells the algorithm's part from the 8 bits'."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW, Optimizer

from coat_kernels.optim import AutomagicCameAMP

from ..family.entrants import NEVER, cameamp_scale

WEIGHT_DECAY = 0.01
REFERENCE = "torch AdamW"
PROFILES = ("memory_optimized", "balanced", "quality_optimized")
FLOAT32 = "balanced, float32 states"

#: Learning rates of each entrant's sweep.
LRS: dict[str, tuple[float, ...]] = {
    REFERENCE: (3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    **{profile: (3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2) for profile in PROFILES},
}


def build(name: str, parameters: list[nn.Parameter], lr: float, steps: int) -> Optimizer:
    """The optimizer of an entrant, for a run of so many steps."""
    if name == REFERENCE:
        return AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    # tensors of so small an adapter lie under min_8bit_size: force all of them into 8 bits
    states = {"profile": "balanced", "min_8bit_size": NEVER} if name == FLOAT32 else {"profile": name, "force_8bit": True}
    return AutomagicCameAMP(parameters, verbose=False, weight_decay=WEIGHT_DECAY, **cameamp_scale(lr, steps), **states)
