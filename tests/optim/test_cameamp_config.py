"""Names, defaults and profiles of `Automagic_CameAMP_Improved_8Bit`: what users' configuration files rely on."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import pickle

import pytest
import torch
from torch import nn

import coat_kernels.optim as optim
from coat_kernels.optim import AutomagicCameAMP, Improved8BitOptimizerConfig, create_improved_8bit_optimizer
from coat_kernels.optim.cameamp_config import PROFILES

DEFAULTS = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "lr_bump": 3e-6,
    "eps": (1e-30, 1e-16, 1e-8),
    "clip_threshold": 1.0,
    "betas": (0.8, 0.99, 0.999),
    "eta": 2.0,
    "beta1_decay": 0.9995,
    "weight_decay": 5e-4,
    "warmup_steps": 500,
    "edge_threshold": 0.6,
    "adaptation_rate": 0.25,
    "came": True,
    "full_finetune": False,
    "verbose": False,
    "edge_suppression": True,
    "edge_penalty": 0.1,
    "background_regularization": True,
    "spatial_awareness": True,
    "frequency_penalty": 0.05,
    "detail_preservation": 0.8,
    "lora_rank_penalty": True,
    "rank_penalty_strength": 0.01,
    "low_rank_emphasis": 1.2,
    "optim_bits": 8,
    "percentile_clipping": 100,
    "block_wise": True,
    "min_8bit_size": 4096,
    "stable_emb": False,
    "fused_adam": False,
    "force_8bit": False,
    "profile": None,
}
EXPECTED = {
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
CLASSES = {
    "memory_optimized": optim.CameAMPMemoryOptimized,
    "quality_optimized": optim.CameAMPQualityOptimized,
    "balanced": optim.CameAMPBalanced,
}


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3, 4))]


def test_defaults() -> None:
    assert dataclasses.asdict(Improved8BitOptimizerConfig()) == DEFAULTS
    assert dataclasses.asdict(AutomagicCameAMP(params()).config) == DEFAULTS


@pytest.mark.parametrize("profile", EXPECTED)
def test_a_profile_sets_its_fields_and_no_other(profile: str) -> None:
    assert PROFILES[profile] == EXPECTED[profile]
    want = {**DEFAULTS, **EXPECTED[profile], "profile": profile}
    for optimizer in (
        AutomagicCameAMP(params(), profile=profile),
        create_improved_8bit_optimizer(params(), profile=profile),
        create_improved_8bit_optimizer(params(), profile),
        CLASSES[profile](params()),
    ):
        assert dataclasses.asdict(optimizer.config) == want
    assert dataclasses.asdict(Improved8BitOptimizerConfig(profile=profile)) == want


def test_explicit_arguments_win_also_where_they_equal_the_default() -> None:
    optimizer = create_improved_8bit_optimizer(params(), profile="memory_optimized", edge_suppression=True, frequency_penalty=0.05, lr=3e-4)
    config = optimizer.config
    assert (config.edge_suppression, config.frequency_penalty, config.min_8bit_size) == (True, 0.05, 1024)
    assert config.lr == optimizer.param_groups[0]["lr"] == 3e-4
    assert AutomagicCameAMP(params(), profile="quality_optimized", verbose=False).config.verbose is False
    assert AutomagicCameAMP(params(), profile="quality_optimized", edge_penalty=None).config.edge_penalty == 0.15


@pytest.mark.parametrize("profile", ["Balanced", "balance", "MEMORY_OPTIMIZED", "quality", ""])
def test_an_unknown_profile_names_the_three(profile: str) -> None:
    with pytest.raises(ValueError, match="memory_optimized, quality_optimized, balanced, case-sensitive"):
        AutomagicCameAMP(params(), profile=profile)
    if profile == "Balanced":
        with pytest.raises(ValueError, match="unknown profile 'Balanced'; did you mean 'balanced'"):
            Improved8BitOptimizerConfig(profile=profile)


def test_one_profile_only() -> None:
    with pytest.raises(TypeError, match=r"profile is one name of .*, got \['balanced', 'memory_optimized'\]"):
        AutomagicCameAMP(params(), profile=["balanced", "memory_optimized"])
    with pytest.raises(ValueError, match="CameAMPBalanced is the profile 'balanced'; for 'memory_optimized' take AutomagicCameAMP"):
        optim.CameAMPBalanced(params(), profile="memory_optimized")


@pytest.mark.parametrize("make", [AutomagicCameAMP, create_improved_8bit_optimizer, optim.CameAMPBalanced])
def test_a_misspelt_option_suggests_the_nearest(make) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'edge_supression'; did you mean 'edge_suppression'"):
        make(params(), edge_supression=True)
    with pytest.raises(TypeError, match="'wd_mult'$"):
        make(params(), wd_mult=1)
    with pytest.raises(TypeError, match="did you mean 'warmup_steps'"):
        Improved8BitOptimizerConfig(warmup_step=3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"percentile_clipping": 5}, "gradient norms of past steps are not kept; use torch.nn.utils.clip_grad_norm_"),
        ({"block_wise": False}, "always scaled by blocks"),
        ({"stable_emb": True}, "step them with an optimizer of optim_bits=32"),
        ({"fused_adam": True}, "one fused launch already"),
        ({"optim_bits": 4}, "optim_bits is 8, or 32 for float32 states, got 4"),
        ({"optim_bits": 32, "force_8bit": True}, "force_8bit=True contradicts optim_bits=32"),
        ({"warmup_steps": 1.5}, "warmup_steps must be an integer of 0 or more, got 1.5"),
        ({"min_8bit_size": -1}, "min_8bit_size must be an integer of 0 or more, got -1"),
        ({"edge_penalty": 2.0}, "Invalid edge_penalty value: 2.0; it must be between 0 and 1"),
        ({"rank_penalty_strength": -1}, "Invalid rank_penalty_strength value: -1; it must be 0 or more"),
        ({"min_lr": 0.0}, "Invalid min_lr value: 0.0; it must be above 0"),
        ({"min_lr": 1e-2}, "max_lr=0.001 lies below min_lr=0.01"),
        ({"betas": (0.9, 0.99)}, "betas must be 3 numbers"),
        ({"betas": (0.9, 0.99, 1.0)}, "Invalid beta parameter at index 2: 1.0"),
        ({"eps": (1e-8,)}, "eps must be a tuple of 3 numbers of 0 or more"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"lr": -1}, "Invalid learning rate: -1"),
        ({"block_size": 100}, "block size 100 is not offered"),
        ({"param_rounding": "split"}, "offers 'nearest' and 'stochastic'"),
        ({"capturable": True}, "step counts live in host memory"),
        ({"differentiable": True}, "does not support differentiable=True"),
    ],
)
def test_options_that_are_not_offered_say_why(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutomagicCameAMP(params(), **option)


def test_booleans_are_no_strings() -> None:
    with pytest.raises(TypeError, match="edge_suppression is True or False, got 'false'"):
        AutomagicCameAMP(params(), edge_suppression="false")
    with pytest.raises(TypeError, match="edge_penalty is a number, got True"):
        AutomagicCameAMP(params(), edge_penalty=True)


def test_groups_set_numbers_and_not_what_is_stored() -> None:
    optimizer = AutomagicCameAMP([{"params": params(), "edge_penalty": 0.3, "lr": 1e-4}, {"params": params()}], lr=1e-5)
    assert [group["edge_penalty"] for group in optimizer.param_groups] == [0.3, 0.1]
    with pytest.raises(ValueError, match="warmup_steps cannot differ between param groups"):
        optimizer.add_param_group({"params": params(), "warmup_steps": 5})
    with pytest.raises(ValueError, match="Invalid frequency_penalty value: 7"):
        optimizer.add_param_group({"params": params(), "frequency_penalty": 7})
    assert len(optimizer.param_groups) == 2


def test_verbose_logs_the_final_configuration(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="coat_kernels"):
        AutomagicCameAMP(params(), profile="balanced", edge_penalty=0.25)
        AutomagicCameAMP(params())
    (message,) = caplog.messages
    assert "profile='balanced'" in message
    assert "edge_penalty=0.25" in message
    assert capsys.readouterr().out == ""


def test_an_lr_that_the_mask_would_cut_is_said(caplog: pytest.LogCaptureFixture) -> None:
    AutomagicCameAMP(params(), lr=2e-3)
    AutomagicCameAMP(params(), lr=1e-8)
    AutomagicCameAMP(params(), lr=0.0)  # where a scheduler's warm-up starts
    assert caplog.messages == [
        "lr 0.002 lies above max_lr 0.001, which bounds every element's learning rate: raise max_lr",
        "lr 1e-08 lies below min_lr 1e-07, which bounds every element's learning rate: lower min_lr",
    ]


def test_trainers_can_find_the_options_and_the_names() -> None:
    signature = inspect.signature(AutomagicCameAMP)
    assert set(DEFAULTS) <= set(signature.parameters)
    assert AutomagicCameAMP is optim.Automagic_CameAMP_Improved_8Bit
    for name in ("AutomagicCameAMP", "CameAMPMemoryOptimized", "CameAMPQualityOptimized", "CameAMPBalanced"):
        assert not name.lower().endswith("8bit"), "sd-scripts and ai-toolkit send such names to bitsandbytes"
        assert inspect.signature(getattr(optim, name)) == signature


def test_the_configuration_is_frozen_and_travels() -> None:
    optimizer = AutomagicCameAMP(params(), profile="balanced", edge_penalty=0.3, seed=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        optimizer.config.edge_penalty = 0.1
    assert dataclasses.replace(optimizer.config, edge_penalty=0.1).profile == "balanced"
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.config == optimizer.config
        assert twin.seed == 7
