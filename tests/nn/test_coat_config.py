"""COATConfig: defaults, checks and the optimizer's part."""

from __future__ import annotations

import pytest

from coat_kernels.config import COATConfig, FP8QuantizationConfig


def test_defaults_give_the_optimizers_defaults() -> None:
    assert COATConfig().to_fp8_quant_config() == FP8QuantizationConfig()


def test_the_optimizers_fields_are_passed_on() -> None:
    config = COATConfig(optimizer_m1_format="e5m2", optimizer_m2_format="log8", optimizer_block_size=64, use_dynamic_range_expansion=False)
    want = FP8QuantizationConfig(m1_format="e5m2", m2_format="log8", block_size=64, use_dynamic_range_expansion=False)
    assert config.to_fp8_quant_config() == want
    off = COATConfig(use_fp8_optimizer=False).to_fp8_quant_config()
    assert not off.use_fp8_m1
    assert not off.use_fp8_m2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_linear_granularity", "per_group"),
        ("activation_nonlinear_granularity", "per_tensor"),
        ("activation_group_size", 100),
        ("activation_format", "fp8"),
        ("attention_format", "none"),
        ("attention_group_size", 8),
        ("frozen_weight_format", "int8"),
        ("frozen_weight_granularity", "per_row"),
        ("optimizer_m1_format", "log8"),
        ("optimizer_block_size", 16),
    ],
)
def test_unknown_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field.removeprefix("optimizer_").replace("block_size", "group")):
        COATConfig(**{field: value})


@pytest.mark.parametrize("field", ["use_fp8_optimizer", "use_fp8_activation", "enable_memory_efficient_checkpoint", "log_memory_stats"])
def test_switches_are_bools(field: str) -> None:
    with pytest.raises(TypeError, match=f"{field} must be True or False"):
        COATConfig(**{field: "yes"})
