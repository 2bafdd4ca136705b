"""The counter-based generator, stochastic and split storage of parameters."""

from __future__ import annotations

import math

import pytest
import torch

from coat_kernels.formats.parameters import check_param_rounding, round_stochastic, split_decode, split_encode
from coat_kernels.formats.random import half_words, stream_key, uniform8


def fmix32(h: int) -> int:
    h ^= h >> 16
    h = h * 0x85EBCA6B & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def test_the_generator_is_what_the_page_says() -> None:
    seed, step, tensor, stream = 12345, 7, 3, 1
    key = fmix32((fmix32(fmix32(seed) + step & 0xFFFFFFFF) + 4 * tensor + stream) & 0xFFFFFFFF)
    assert stream_key(seed, step, tensor, stream) == key
    eight, sixteen = uniform8(key, 41), half_words(key, 41)
    for i in range(41):
        byte = fmix32(key + (i >> 2) * 0x9E3779B9 & 0xFFFFFFFF) >> 8 * (i & 3) & 0xFF
        half = fmix32(key + (i >> 1) * 0x9E3779B9 & 0xFFFFFFFF) >> 16 * (i & 1) & 0xFFFF
        assert eight[i].item() == (byte + 0.5) / 256
        assert sixteen[i].item() == half


def test_the_generator_is_uniform_and_streams_differ() -> None:
    n = 1 << 18
    u = uniform8(stream_key(0, 1, 0, 0), n)
    counts = torch.bincount((u * 256).long(), minlength=256).double()
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert chi2 < 255 + 5 * math.sqrt(2 * 255)  # five standard deviations
    other = uniform8(stream_key(0, 2, 0, 0), n)
    correlation = torch.corrcoef(torch.stack([u, other]))[0, 1].abs()
    assert correlation < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_parameters_are_unbiased(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0001, -0.99999, -3.14159, 1e-3, 255.3, 6.1e-5, -7e-6])
    x = x.repeat_interleave(1 << 15)
    stored = round_stochastic(x, dtype, key=99).float().view(7, -1)
    exact = x.view(7, -1)[:, 0]
    ulp = stored.amax(1) - stored.amin(1)
    assert (ulp > 0).all()
    assert ((stored.double().mean(1) - exact).abs() <= ulp * 5 * 0.5 / math.sqrt(1 << 15)).all()
    neighbours = torch.stack([stored.amin(1), stored.amax(1)])
    assert ((neighbours[0] <= exact) & (exact <= neighbours[1])).all()


def test_values_the_dtype_holds_are_stored_exactly() -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    stored = round_stochastic(x.float(), torch.bfloat16, key=1)
    finite = x.isfinite()
    assert torch.equal(stored[finite], x[finite])
    assert torch.equal(stored[~finite].isnan(), x[~finite].isnan())


def test_split_keeps_24_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 16, generator=generator) * torch.exp2(torch.randint(-100, 120, (1 << 16,), generator=generator).float())
    param, residual = split_encode(x)
    back = split_decode(param, residual)
    assert ((back - x).abs() <= x.abs() * 2.0**-16).all()  # 15 stored mantissa bits, rounded
    assert torch.equal(split_decode(*split_encode(back)), back)
    # the bfloat16 half is x to bfloat16, to a tie of the 24-bit rounding before it
    assert ((param.float() - x).abs() <= x.abs() * (2.0**-8 + 2.0**-16)).all()


def test_split_special_values() -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, torch.finfo(torch.float32).max, 1e-45])
    param, residual = split_encode(x)
    assert torch.equal(residual[:4], torch.zeros(4, dtype=torch.int8))
    assert torch.equal(param[:4].float(), x[:4])
    assert param[1].signbit()
    assert param[4].isnan()
    assert split_decode(param, residual)[4].isnan()
    assert param[5].isinf()


def test_every_bfloat16_with_every_residual_roundtrips() -> None:
    param = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    param = param[param.isfinite() & (param != 0)].repeat_interleave(8)
    residual = torch.tensor([-127, -64, -1, 0, 1, 7, 64, 126], dtype=torch.int8).repeat(len(param) // 8)
    value = split_decode(param, residual)
    keep = value.isfinite()
    again = split_encode(value[keep])
    assert torch.equal(again[0], param[keep])
    assert torch.equal(again[1], residual[keep])


def test_unknown_rounding_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown param_rounding 'floor'; choose one of 'nearest', 'stochastic', 'split'"):
        check_param_rounding("floor")
