"""The table of codecs: constants against torch's own float8 dtypes, and errors."""

from __future__ import annotations

import pytest
import torch

from coat_kernels.config import FP8QuantizationConfig
from coat_kernels.formats import CODECS, check_group_size, codec_name, get_codec
from coat_kernels.formats.codecs import NAN_CODE
from coat_kernels.formats.reference import code_values

TORCH_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_constants_are_torchs(name: str) -> None:
    codec, info = get_codec(name), torch.finfo(TORCH_DTYPES[name])
    assert codec.max == info.max
    assert codec.min_subnormal == info.smallest_normal * info.eps
    values = torch.arange(256, dtype=torch.uint8).view(TORCH_DTYPES[name]).to(torch.float32)
    # torch's infinities (e5m2 0x7C, 0xFC) are codes no encoder writes; they read as NaN here
    expected = torch.where(values.isinf(), torch.nan, values)
    assert torch.equal(code_values(codec).nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert code_values(codec)[NAN_CODE].isnan()


def test_the_expansion_targets_the_second_subnormal_step() -> None:
    assert get_codec("e4m3_expand").range_q15 == 8811894
    assert get_codec("e5m2_expand").range_q15 == 16151926
    assert get_codec("e2m1_expand").range_q15 == 1355264


def test_e2m1_is_the_ocp_format() -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.equal(code_values(get_codec("e2m1")), torch.cat([values, -values]))


def test_arrays_of_codes() -> None:
    assert get_codec("e2m1").codes_shape((3, 5)) == (8,)
    assert get_codec("e2m1").codes_shape((0,)) == (0,)
    assert get_codec("e2m1").codes_shape(()) == (1,)
    for name in ("e4m3_expand", "log8", "softsign8", "bfloat16", "float32"):
        assert get_codec(name).codes_shape((3, 5)) == (3, 5)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    assert all(codec.array_dtype == dtypes.get(name, torch.uint8) for name, codec in CODECS.items())
    assert {name for name, codec in CODECS.items() if not codec.quantized} == set(dtypes)


def test_indices_are_the_kernels() -> None:
    names = ["float32", "e4m3", "e4m3_expand", "e5m2", "e5m2_expand", "log8", "dynamic8", "softsign8", "e2m1", "e2m1_expand", "bfloat16"]
    assert {name: codec.index for name, codec in CODECS.items()} == {name: index for index, name in enumerate(names)}


def test_errors_name_what_is_known() -> None:
    with pytest.raises(ValueError, match="unknown codec 'e3m4'; known codecs: float32, e4m3"):
        get_codec("e3m4")
    with pytest.raises(ValueError, match="unknown format 'int4'; known formats: e4m3, e5m2, log8"):
        codec_name("int4", True)
    with pytest.raises(ValueError, match="group size 100 is not offered; choose one of 32, 64, 128, 256"):
        check_group_size(100)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"m1_format": "fp4"}, ValueError, "unknown m1_format 'fp4'; known formats"),
        ({"m2_format": "float16"}, ValueError, "unknown m2_format 'float16'; known formats: e4m3, e5m2, log8, e2m1, bfloat16, float32"),
        ({"m1_format": "log8"}, ValueError, "signed first moment"),
        ({"m2_format": "softsign8"}, ValueError, "too narrow for second moments"),
        ({"m2_rounding": "up"}, ValueError, "unknown m2_rounding 'up'"),
        ({"m1_rounding": None}, ValueError, "unknown m1_rounding None"),
        ({"block_size": 100}, ValueError, "group size 100"),
        ({"use_fp8_m1": "yes"}, TypeError, "use_fp8_m1 must be True or False, got 'yes'"),
    ],
)
def test_config_errors(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FP8QuantizationConfig(**options)


def test_config_chooses_codecs() -> None:
    config = FP8QuantizationConfig(m2_format="log8", use_dynamic_range_expansion=False)
    assert (config.exp_avg_codec.name, config.exp_avg_sq_codec.name) == ("e4m3", "log8")
    assert (config.m1_rounding, config.exp_avg_sq_rounding) == ("nearest", "stochastic")
    assert FP8QuantizationConfig(use_fp8_m1=False).exp_avg_codec.name == "float32"
    small = FP8QuantizationConfig(m1_format="softsign8", m2_format="e2m1")
    assert (small.exp_avg_codec.name, small.exp_avg_sq_codec.name, small.exp_avg_sq_rounding) == ("softsign8", "e2m1_expand", "nearest")
    four_bits = FP8QuantizationConfig(m1_format="e2m1", m2_format="e2m1")
    assert (four_bits.exp_avg_codec.name, four_bits.exp_avg_sq_codec.name) == ("e2m1", "e2m1_expand")
    recommended = FP8QuantizationConfig.recommended()
    assert (recommended.exp_avg_codec.name, recommended.exp_avg_sq_codec.name, recommended.block_size) == ("e4m3_expand", "log8", 128)
    plain = FP8QuantizationConfig(m1_format="float32", m2_format="bfloat16")
    assert (plain.exp_avg_codec.name, plain.exp_avg_sq_codec.name, plain.exp_avg_sq_rounding) == ("float32", "bfloat16", "stochastic")
