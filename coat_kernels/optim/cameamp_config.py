"""Settings of `Automagic_CameAMP_Improved_8Bit`: every field with its default, the profiles, and the rules between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ._adam import check_eps
from ._names import check_names, nearest

#: What each profile sets; nothing else, and never lr.
PROFILES: dict[str, dict[str, Any]] = {
    "memory_optimized": {
        "force_8bit": True,
        "min_8bit_size": 1024,
        "edge_suppression": False,
        "spatial_awareness": False,
        "background_regularization": False,
        "lora_rank_penalty": False,
        "frequency_penalty": 0.0,
        "verbose": False,
    },
    "quality_optimized": {
        "edge_suppression": True,
        "edge_penalty": 0.15,
        "background_regularization": True,
        "spatial_awareness": True,
        "lora_rank_penalty": True,
        "frequency_penalty": 0.08,
        "rank_penalty_strength": 0.02,
        "verbose": True,
    },
    "balanced": {
        "min_8bit_size": 4096,
        "edge_suppression": True,
        "edge_penalty": 0.1,
        "background_regularization": True,
        "spatial_awareness": True,
        "lora_rank_penalty": True,
        "frequency_penalty": 0.05,
        "verbose": True,
    },
}

#: Options of bitsandbytes that the original accepted and ignored: the one value they have here, and why no other.
_FIXED = {
    "percentile_clipping": (100, "gradient norms of past steps are not kept; use torch.nn.utils.clip_grad_norm_"),
    "block_wise": (True, "one scale for a whole tensor loses its small values; states are always scaled by blocks"),
    "stable_emb": (False, "an optimizer cannot tell embeddings from other parameters; step them with an optimizer of optim_bits=32"),
    "fused_adam": (False, "the step is one fused launch already; drop the option"),
}


@dataclass(frozen=True, init=False)
class Improved8BitOptimizerConfig:
    """Settings of `Automagic_CameAMP_Improved_8Bit`. Given fields win over the profile, and the profile over the defaults.

    Fields marked (group) may differ between param groups; the others decide what is stored and hold for the whole optimizer.

    Args:
        lr: (group) learning rate, which the warm-up's mask starts from.
        min_lr, max_lr: (group) bounds of an element's learning rate.
        lr_bump: (group) what the mask moves by where a gradient keeps its sign from one step to the next, or loses it.
        eps: (group) added to g², to the instability and to the sum of |g|.
        clip_threshold: (group) largest RMS of the normalised gradient and of the update.
        betas: (group) decay rates of momentum, second moment and instability.
        eta: (group) a row whose parameters have norm n moves by 1/(eta · sqrt(n + 1/eta²)), unless `full_finetune` (ALLoRA).
        beta1_decay: (group) beta1 of step t after the first half of the warm-up is max(beta1 · beta1_decay^t, 0.4).
        weight_decay: (group) decoupled weight decay.
        warmup_steps: steps in which the mask moves; torque and edge history live in their first half.
        edge_threshold: (group) an edge is where a gradient's Laplacian exceeds this many times 4 RMS.
        adaptation_rate: (group) of the torque's moving average.
        came: divide the update by the root of its instability (CAME); False takes the momentum.
        full_finetune: (group) no scaling of rows.
        verbose: log the configuration at construction, level INFO of the logger `coat_kernels.optim`.
        edge_suppression: move less where the gradient has edges; `edge_penalty` (group) is its strength.
        background_regularization: (group) after the first half of the warm-up, halve the update of rows whose gradient hardly varies.
        spatial_awareness: scale `lr_bump` with the row's variance times `detail_preservation` (group), in 0.5 to 1.5.
        frequency_penalty: (group) share of the gradient's high frequencies that is removed.
        lora_rank_penalty: shrink the singular values past the 10th of matrices with a side of 11 to 128;
            `rank_penalty_strength` (group) in units of the gradient's RMS; `low_rank_emphasis` (group) multiplies their torque.
        optim_bits: 8, or 32 for float32 states.
        min_8bit_size: tensors with fewer elements keep float32 states.
        force_8bit: 8 bits for tensors of every size.
        percentile_clipping, block_wise, stable_emb, fused_adam: known for their names; only the default is accepted.
        profile: a key of `PROFILES`, case-sensitive, or None.

    Raises:
        TypeError: an unknown field; names the nearest.
        ValueError: an unknown profile, or a value out of range.
    """

    lr: float = 1e-6
    min_lr: float = 1e-7
    max_lr: float = 1e-3
    lr_bump: float = 3e-6
    eps: tuple[float, float, float] = (1e-30, 1e-16, 1e-8)
    clip_threshold: float = 1.0
    betas: tuple[float, float, float] = (0.8, 0.99, 0.999)
    eta: float = 2.0
    beta1_decay: float = 0.9995
    weight_decay: float = 5e-4
    warmup_steps: int = 500
    edge_threshold: float = 0.6
    adaptation_rate: float = 0.25
    came: bool = True
    full_finetune: bool = False
    verbose: bool = False
    edge_suppression: bool = True
    edge_penalty: float = 0.1
    background_regularization: bool = True
    spatial_awareness: bool = True
    frequency_penalty: float = 0.05
    detail_preservation: float = 0.8
    lora_rank_penalty: bool = True
    rank_penalty_strength: float = 0.01
    low_rank_emphasis: float = 1.2
    optim_bits: int = 8
    percentile_clipping: int = 100
    block_wise: bool = True
    min_8bit_size: int = 4096
    stable_emb: bool = False
    fused_adam: bool = False
    force_8bit: bool = False
    profile: str | None = None

    def __init__(self, **given: Any) -> None:
        defaults = {field.name: field.default for field in fields(type(self))}
        check_names(type(self).__name__, given, defaults)
        values = {**defaults, **profile_settings(given.get("profile")), **given}
        for name, value in values.items():
            object.__setattr__(self, name, tuple(value) if name in ("eps", "betas") and isinstance(value, list) else value)
        self._check()

    def _check(self) -> None:
        for name, default in ((field.name, field.default) for field in fields(self)):
            value = getattr(self, name)
            if isinstance(default, bool) != isinstance(value, bool) and name not in ("lr", "profile"):
                raise TypeError(f"{name} is {'True or False' if isinstance(default, bool) else 'a number'}, got {value!r}")
        for name, (only, reason) in _FIXED.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)!r} is not offered, only {only!r}: {reason}")
        if self.optim_bits not in (8, 32):
            raise ValueError(f"optim_bits is 8, or 32 for float32 states, got {self.optim_bits!r}")
        if self.optim_bits == 32 and self.force_8bit:
            raise ValueError("force_8bit=True contradicts optim_bits=32; leave one of them out")
        for name in ("warmup_steps", "min_8bit_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be an integer of 0 or more, got {getattr(self, name)!r}")
        check_numbers({field.name: getattr(self, field.name) for field in fields(self)})


#: Fields that hold for the whole optimizer.
STRUCTURAL = (
    *("warmup_steps", "came", "edge_suppression", "spatial_awareness", "lora_rank_penalty"),
    *("optim_bits", "min_8bit_size", "force_8bit", "verbose", "profile", *_FIXED),
)
#: Fields that a param group may set for itself.
GROUP_FIELDS = tuple(field.name for field in fields(Improved8BitOptimizerConfig) if field.name not in STRUCTURAL)

_UNIT = ("edge_penalty", "frequency_penalty", "adaptation_rate", "beta1_decay")
_NOT_NEGATIVE = ("lr_bump", "edge_threshold", "rank_penalty_strength", "low_rank_emphasis", "detail_preservation", "weight_decay")
_POSITIVE = ("min_lr", "max_lr", "clip_threshold", "eta")


def check_numbers(values: dict[str, Any]) -> None:
    """Ranges of the numbers that a configuration or a param group holds.

    Raises:
        ValueError: what was got and what is needed.
    """
    for names, words, allowed in (
        (_UNIT, "between 0 and 1", lambda x: 0 <= x <= 1),
        (_NOT_NEGATIVE, "0 or more", lambda x: 0 <= x < math.inf),
        (_POSITIVE, "above 0", lambda x: 0 < x < math.inf),
    ):
        for name in names:
            if not allowed(values[name]):
                raise ValueError(f"Invalid {name} value: {values[name]}; it must be {words}")
    if values["max_lr"] < values["min_lr"]:
        raise ValueError(f"max_lr={values['max_lr']} lies below min_lr={values['min_lr']}; the learning rate mask has no room")
    check_eps(values["eps"], 3)


def profile_settings(profile: str | None) -> dict[str, Any]:
    """What a profile sets; `ValueError` names the three and the nearest."""
    if profile is None:
        return {}
    if not isinstance(profile, str):
        raise TypeError(f"profile is one name of {', '.join(PROFILES)}, got {profile!r}")
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}{nearest(profile, PROFILES)}; the profiles are {', '.join(PROFILES)}, case-sensitive")
    return PROFILES[profile]
