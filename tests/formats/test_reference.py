"""The PyTorch reference against formats/README.md: exhaustively where the input is finite, at every position of a group otherwise."""

from __future__ import annotations

import math

import pytest
import torch

from coat_kernels.formats import CODECS, Codec, get_codec
from coat_kernels.formats.codecs import NAN_CODE
from coat_kernels.formats.reference import code_values, decode_group, encode_group

G = 128
QUANTIZED = [codec for codec in CODECS.values() if codec.quantized and not codec.blockwise]
EXPANDED = [codec for codec in QUANTIZED if codec.expand]
FLOAT32_MAX = torch.finfo(torch.float32).max

codecs = pytest.mark.parametrize("codec", QUANTIZED, ids=lambda codec: codec.name)
expanded = pytest.mark.parametrize("codec", EXPANDED, ids=lambda codec: codec.name)


def sample(codec: Codec, numel: int = 4096, spread: float = 1.5, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed values, signed where the codec is."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * torch.exp(spread * torch.randn(numel, generator=generator))
    return x if codec.signed else x.abs()


def roundtrip(x: torch.Tensor, codec: Codec, **kwargs) -> torch.Tensor:
    return decode_group(*encode_group(x, codec, G, signed=codec.signed, **kwargs), codec, G)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_without_expansion_it_is_torchs_cast(name: str) -> None:
    codec = get_codec(name)
    x = sample(codec)
    codes, amax, k16 = encode_group(x, codec, G)
    scale = (amax / torch.full_like(amax, codec.max)).repeat_interleave(G)
    expected = (x / scale).clamp(-codec.max, codec.max).to({"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name])
    nonzero = codes & 0x7F > 0
    assert torch.equal(codes[nonzero], expected.view(torch.uint8)[nonzero])
    assert (expected.to(torch.float32)[~nonzero] == 0).all()
    assert torch.equal(decode_group(codes, amax, k16, codec, G), torch.where(nonzero, expected.to(torch.float32) * scale, 0))


def exact_k16(codec: Codec, amax: float, amin: float) -> float:
    """16k of the paper's rule in exact arithmetic, before flooring."""
    octaves = min(math.log2(amax) - math.log2(amin), 32)
    return 16 * math.log2(codec.max / (2 * codec.min_subnormal)) / octaves


@expanded
@pytest.mark.parametrize("octaves", [1.2, 2.5, 5.0, 11.3, 20.0, 31.0])
def test_k_follows_the_papers_rule(codec: Codec, octaves: float) -> None:
    amax = 3.7e-4
    x = torch.full((G,), amax)
    x[5] = amin = amax * 2.0**-octaves
    _, got_amax, k16 = encode_group(x, codec, G)
    assert got_amax.item() == x[0].item()
    # the integer range is within 0.0861 octave of the true one, and k16 is floored
    low, high = (exact_k16(codec, amax, amin * 2.0**-0.0862), exact_k16(codec, amax, min(amin * 2.0**0.0862, amax * 0.99)))
    assert max(math.floor(min(low, 255)), 1) <= k16.item() <= min(math.floor(high), 255)


@codecs
def test_error_of_a_roundtrip(codec: Codec) -> None:
    x = sample(codec, 1 << 16, spread=0.5)
    codes, amax, k16 = encode_group(x, codec, G, signed=codec.signed)
    error = (decode_group(codes, amax, k16, codec, G) - x).abs() / x.abs()
    k = k16.repeat_interleave(G).float() / 16
    # log8: half a step of j/250 octaves; FP8: half a unit in the last place, shrunk by k, and downwards, where it weighs a little more
    half_ulp = 2.0 ** -(codec.mantissa_bits + 1)
    bound = torch.exp2(k * 16 / 500) - 1 if codec.name == "log8" else 1 - (1 - half_ulp) ** (1 / k)
    normal = codes & 0x7F > 1 << codec.mantissa_bits if codec.is_float8 else codes > 1
    assert normal.float().mean() > 0.95
    assert (error[normal] <= bound[normal] + 1e-6).all()


@expanded
def test_every_code_and_k_decodes_as_written(codec: Codec) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = code_values(codec, torch.float64)
    for amax in (1e-37, 1e-20, 1.0, 3e38):
        for k16 in range(1, 256):
            got = decode_group(codes, torch.full((2,), amax), torch.full((2,), k16, dtype=torch.uint8), codec, G, dtype=torch.float64)
            half = torch.exp2(torch.log2(values.abs() / codec.max) * 8 / k16)
            want = torch.copysign(torch.tensor(amax).double() * half * half, values)
            assert torch.equal(got.nan_to_num(7.0), torch.where(values == 0, 0, want).nan_to_num(7.0))
        assert torch.equal(got[codec.max_code], torch.tensor(amax).double())


def test_every_log8_code_decodes_as_written() -> None:
    codec, codes = get_codec("log8"), torch.arange(256, dtype=torch.uint8)
    for amax in (1e-37, 1.0, 3e38):
        for j in range(1, 256):
            got = decode_group(codes, torch.full((2,), amax), torch.full((2,), j, dtype=torch.uint8), codec, G, dtype=torch.float64)
            half = torch.exp2(-(255 - codes.double()) * j / 500)
            assert torch.equal(got[1:], (torch.tensor(amax).double() * half * half)[1:])
            assert got[0] == 0


@codecs
@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 1000])
def test_sizes(codec: Codec, size: int) -> None:
    x = sample(codec, size)
    codes, amax, k16 = encode_group(x, codec, G, signed=codec.signed)
    groups = -(-size // G)
    assert (codes.shape, amax.shape, k16.shape) == ((size,), (groups,), (groups,))
    assert decode_group(codes, amax, k16, codec, G).shape == (size,)


@codecs
@pytest.mark.parametrize("tail", [1, 127, 128])
def test_degenerate_inputs_at_every_position(codec: Codec, tail: int) -> None:
    """The table of README.md, in a last group of `tail` elements, behind one ordinary group that must not change."""
    before = sample(codec, G)
    plain = encode_group(before, codec, G, signed=codec.signed)
    for position in range(tail):
        for value in (0.0, -0.0, 1.25e-3, 1e-45, FLOAT32_MAX, math.nan, math.inf, -1.25e-3, -math.inf):
            if value < 0 and not codec.signed:
                continue
            group = sample(codec, tail, seed=1)
            group[position] = value
            codes, amax, k16 = encode_group(torch.cat([before, group]), codec, G, signed=codec.signed)
            assert torch.equal(codes[:G], plain[0])
            assert amax[0] == plain[1][0]
            assert k16.min() >= 1
            rest = torch.cat([group[:position], group[position + 1 :]])
            decoded = decode_group(codes, amax, k16, codec, G)[G:]
            if not math.isfinite(value):
                assert codes[G + position] == (NAN_CODE if codec.is_float8 else 0)
                assert amax[1] == (rest.abs().max() if tail > 1 else 0)
            elif value == 0:
                assert codes[G + position] == 0
                assert decoded[position] == 0
                assert not decoded[position].signbit()
            else:
                kept = codec.expand or not codec.signed
                assert decoded[position] != 0 or not kept or abs(value) == 1e-45
                assert decoded[position].sign() in (0, math.copysign(1, value))
            others = torch.cat([decoded[:position], decoded[position + 1 :]])
            assert others.isfinite().all()


@codecs
def test_equal_magnitudes_roundtrip_exactly(codec: Codec) -> None:
    for value in (1.0, 0.7, 1.2345e-9, 3.3e37, 2.0**-126):
        for count in (1, 2, 127, 128):
            x = torch.full((count,), value)
            if codec.signed:
                x[::3] = -value
            x[1::5] = 0.0
            assert torch.equal(roundtrip(x, codec), x) or (not codec.expand and codec.is_float8)
            if codec.is_float8 and not codec.expand:
                # amax / max, times max, is amax to a rounding, unless the scale is subnormal
                assert torch.allclose(roundtrip(x, codec), x, rtol=1.2e-7 if value > 1e-30 else 5e-3, atol=0)


@expanded
def test_widest_group_is_monotone_and_keeps_every_value(codec: Codec) -> None:
    x = torch.logspace(0, 38, G)
    decoded = roundtrip(x, codec)
    assert decoded.isfinite().all()
    assert (decoded > 0).all()
    assert (decoded.diff() >= 0).all()
    assert encode_group(x, codec, G)[2].item() < 16


@codecs
def test_no_second_moment_becomes_zero(codec: Codec) -> None:
    for octaves in range(1, 250, 7):
        x = torch.exp2(-torch.linspace(0, octaves, G)) * 1e30
        x = x[x >= 2.0**-126]
        codes, amax, k16 = encode_group(x, codec, G, signed=False)
        assert (codes > 0).all()
        assert (decode_group(codes, amax, k16, codec, G, dtype=torch.float64) > 0).all()


@codecs
def test_all_bfloat16_inputs(codec: Codec) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[torch.isfinite(x)] if codec.signed else x[torch.isfinite(x) & ~x.signbit()]
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    decoded = roundtrip(x, codec, dtype=torch.float64)
    assert decoded.isfinite().all()
    assert ((decoded == 0) | (decoded.sign() == x.float().sign())).all()
    normal = x.float().abs() >= 2.0**-126
    if codec.expand or not codec.signed:
        assert (decoded != 0)[normal & (x != 0)].all()


@codecs
def test_stochastic_rounding_is_unbiased(codec: Codec) -> None:
    x = sample(codec, G, spread=0.7)
    draws = 4000
    total = torch.zeros(G, dtype=torch.float64)
    seen = torch.zeros(256, G, dtype=torch.bool)
    for key in range(draws):
        codes, amax, k16 = encode_group(x, codec, G, signed=codec.signed, rounding="stochastic", key=key * 2654435761 % (1 << 32))
        total += decode_group(codes, amax, k16, codec, G)
        seen[codes.long(), torch.arange(G)] = True
    # at most two codes for each input, neighbours
    first, last = seen.int().argmax(0), 255 - seen.flip(0).int().argmax(0)
    assert (last - first).max() == 1
    values = decode_group(
        torch.stack([first - 1, first, first + 1, first + 2]).clamp(0, 255).to(torch.uint8), amax.expand(4), k16.expand(4), codec, G
    )
    step = values.diff(dim=0).abs().nan_to_num(0).amax(0)
    # five standard errors of a coin with any odds, and the generator's 256 values (half of 1/256 of a step)
    assert ((total / draws - x).abs() <= step * (5 * 0.5 / math.sqrt(draws) + 1 / 512) + 1e-6 * x.abs()).all()


def test_float64_reference_differs_from_float32_by_at_most_a_step() -> None:
    codec = get_codec("e4m3_expand")
    x = sample(codec, 1 << 16)
    single, double = (encode_group(x, codec, G, dtype=dtype)[0].int() for dtype in (torch.float32, torch.float64))
    difference = (single - double).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 2e-4  # log2's last bit, times k, near a rounding boundary
