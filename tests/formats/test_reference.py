"""The PyTorch reference against formats/README.md: exhaustively where the input is finite, at every position of a group otherwise."""

from __future__ import annotations

import math

import pytest
import torch

from coat_kernels.formats import CODECS, Codec, get_codec
from coat_kernels.formats.random import uniform8
from coat_kernels.formats.reference import code_values, decode_group, encode_group, pack_codes, round_bfloat16, unpack_codes
from tests.codes import codes_at, places

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
    return decode_group(*encode_group(x, codec, G, signed=codec.signed, **kwargs), codec, G, shape=x.shape)


def encode(x: torch.Tensor, codec: Codec, **kwargs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`encode_group`, with one code an element."""
    codes, amax, k16 = encode_group(x, codec, G, **kwargs)
    return unpack_codes(codes, codec, x.shape), amax, k16


def decode(codes: torch.Tensor, amax: torch.Tensor, k16: torch.Tensor, codec: Codec, **kwargs) -> torch.Tensor:
    """`decode_group` of one code an element."""
    return decode_group(pack_codes(codes, codec), amax, k16, codec, G, shape=codes.shape, **kwargs)


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


@pytest.mark.parametrize("name", ["e2m1", "e2m1_expand"])
def test_e2m1_is_the_nearest_value(name: str) -> None:
    codec = get_codec(name)
    x = sample(codec)
    codes, amax, k16 = encode(x, codec, dtype=torch.float64)
    top, k = amax.repeat_interleave(G), k16.repeat_interleave(G) / 16
    scaled = x / (top / 6) if name == "e2m1" else torch.copysign((x.double().abs() / top) ** k * 6, x)
    values = code_values(codec)
    distance = (scaled[:, None] - values).abs()
    # a tie goes to the even code, a zero is +0
    even_first = torch.tensor([0, 2, 4, 6, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15])
    want = even_first[distance[:, even_first].argmin(1)]
    assert torch.equal(codes.long(), want)
    decoded = decode(codes, amax, k16, codec)
    power = torch.copysign(top * (values[want].abs().double() / 6) ** (1 / k), values[want])
    torch.testing.assert_close(decoded, (values[want] * (top / 6) if name == "e2m1" else power).float(), rtol=4e-6, atol=0)


def test_two_codes_share_a_byte() -> None:
    codec = get_codec("e2m1")
    codes, _, _ = encode_group(torch.tensor([6.0, -0.5, 3.0]), codec, G)
    assert codes.tolist() == [0x97, 0x05]
    assert unpack_codes(codes, codec, (3,)).tolist() == [7, 9, 5]
    assert unpack_codes(codes, codec).tolist() == [7, 9, 5, 0]
    elements = torch.arange(15, dtype=torch.uint8).view(3, 5)
    assert torch.equal(unpack_codes(pack_codes(elements, codec), codec, (3, 5)), elements)


def test_every_softsign8_code_decodes_as_written() -> None:
    codec, codes = get_codec("softsign8"), torch.arange(256, dtype=torch.uint8)
    number = codes.view(torch.int8).double()
    for amax in (1e-37, 1.0, 3e38):
        got = decode_group(codes, torch.full((2,), amax), torch.full((2,), 16, dtype=torch.uint8), codec, G, dtype=torch.float64)
        y = number / 127
        want = y / (2 - y.abs()) * torch.tensor(amax).double()
        torch.testing.assert_close(got, want, rtol=1e-15, atol=0)
        assert got[127] == torch.tensor(amax).double()
        again, _, _ = encode_group(torch.cat([got[1:128], -got[1:128]]).float(), codec, 256)
        assert torch.equal(again, torch.cat([codes[1:128], -codes[1:128]]))


@pytest.mark.parametrize("name", ["softsign8", "e2m1"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_was_stored_is_stored_alike_again(name: str, rounding: str) -> None:
    """Metadata without expansion depends on amax alone, which round-trips; a stored value is hit by either rounding."""
    codec = get_codec(name)
    stored = encode_group(sample(codec), codec, G)
    value = decode_group(*stored, codec, G, dtype=torch.float64)
    again = encode_group(value, codec, G, rounding=rounding, key=3, dtype=torch.float64)
    assert torch.equal(again[0], stored[0]) or (rounding == "stochastic" and (again[0] != stored[0]).float().mean() < 1e-2)


def test_bfloat16_keeps_finite_values_finite() -> None:
    x = torch.tensor([1.00390625, -1.01171875, FLOAT32_MAX, -FLOAT32_MAX, math.inf, -math.inf, 0.0, -0.0, 1e-45])
    largest = torch.finfo(torch.bfloat16).max
    want = torch.tensor([1.0, -1.015625, largest, -largest, math.inf, -math.inf, 0.0, -0.0, 0.0])
    for got in (round_bfloat16(x), round_bfloat16(x[2:], "stochastic", 5)):
        assert torch.equal(got.float(), want[-len(got) :])
        assert got.isfinite().equal(x[-len(got) :].isfinite())
    assert round_bfloat16(torch.tensor(math.nan)).isnan()


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


@pytest.mark.parametrize("codec", [codec for codec in QUANTIZED if codec.bits == 8], ids=lambda codec: codec.name)
def test_error_of_a_roundtrip(codec: Codec) -> None:
    x = sample(codec, 1 << 16, spread=0.5)
    codes, amax, k16 = encode(x, codec, signed=codec.signed)
    error = (decode(codes, amax, k16, codec) - x).abs() / x.abs()
    k = k16.repeat_interleave(G).float() / 16
    if codec.name == "log8":  # half a step of j/250 octaves
        bound, normal = torch.exp2(k * 16 / 500) - 1, codes > 1
    elif codec.name == "softsign8":  # half a step of y, where x has the derivative 254 · amax / (254 - y)^2
        magnitude = codes.view(torch.int8).abs().float()
        bound = 0.5 * 254 / ((254 - magnitude - 0.5) ** 2 * x.abs() / amax.repeat_interleave(G))
        normal = magnitude > 0
    else:  # half a unit in the last place, shrunk by k, and downwards, where it weighs a little more
        half_ulp = 2.0 ** -(codec.mantissa_bits + 1)
        bound, normal = 1 - (1 - half_ulp) ** (1 / k), codes & (codec.sign_bit - 1) > 1 << codec.mantissa_bits
    assert normal.float().mean() > 0.95
    assert (error[normal] <= bound[normal] + 1e-6).all()


@expanded
def test_every_code_and_k_decodes_as_written(codec: Codec) -> None:
    codes = torch.arange(1 << codec.bits, dtype=torch.uint8)
    groups = -(-len(codes) // G)
    values = code_values(codec, torch.float64)
    for amax in (1e-37, 1e-20, 1.0, 3e38):
        for k16 in range(1, 256):
            got = decode(codes, torch.full((groups,), amax), torch.full((groups,), k16, dtype=torch.uint8), codec, dtype=torch.float64)
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
    assert (codes.shape, amax.shape, k16.shape) == (codec.codes_shape((size,)), (groups,), (groups,))
    assert decode_group(codes, amax, k16, codec, G, shape=(size,)).shape == (size,)


@codecs
@pytest.mark.parametrize("tail", [1, 127, 128])
def test_degenerate_inputs_at_every_position(codec: Codec, tail: int) -> None:
    """The table of README.md, in a last group of `tail` elements, behind one ordinary group that must not change."""
    before = sample(codec, G)
    plain = encode(before, codec, signed=codec.signed)
    for position in range(tail):
        for value in (0.0, -0.0, 1.25e-3, 1e-45, FLOAT32_MAX, math.nan, math.inf, -1.25e-3, -math.inf):
            if value < 0 and not codec.signed:
                continue
            group = sample(codec, tail, seed=1)
            group[position] = value
            codes, amax, k16 = encode(torch.cat([before, group]), codec, signed=codec.signed)
            assert torch.equal(codes[:G], plain[0])
            assert amax[0] == plain[1][0]
            assert k16.min() >= 1
            rest = torch.cat([group[:position], group[position + 1 :]])
            decoded = decode(codes, amax, k16, codec)[G:]
            if not math.isfinite(value):
                assert codes[G + position] == codec.nan_code
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
            scaled = codec.is_float and not codec.expand
            assert torch.equal(roundtrip(x, codec), x) or scaled
            if scaled:
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
        codes, amax, k16 = encode(x, codec, signed=False)
        assert (codes > 0).all()
        assert (decode(codes, amax, k16, codec, dtype=torch.float64) > 0).all()


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
    low, high = torch.full((G,), 255), torch.full((G,), -255)
    for draw in range(draws):
        key = draw * 2654435761 % (1 << 32)
        codes, amax, k16 = encode_group(x, codec, G, signed=codec.signed, rounding="stochastic", key=key)
        total += decode_group(codes, amax, k16, codec, G, shape=x.shape)
        place = places(codes, codec, x.shape)
        low, high = torch.minimum(low, place), torch.maximum(high, place)
    # at most two codes for each input, neighbours
    assert (high - low).max() == 1
    around = torch.stack([low - 1, low, low + 1, low + 2]).clamp(-codec.max_code if codec.signed else 0, codec.max_code)
    values = decode(codes_at(around, codec), amax.expand(4), k16.expand(4), codec)
    step = values.diff(dim=0).abs().amax(0)
    # five standard errors of a coin with any odds, and the generator's 256 values (half of 1/256 of a step)
    assert ((total / draws - x).abs() <= step * (5 * 0.5 / math.sqrt(draws) + 1 / 512) + 1e-6 * x.abs()).all()


def test_softsign8_draws_with_the_exact_probability() -> None:
    codec = get_codec("softsign8")
    x = sample(codec, 1 << 16).abs().double()
    codes, amax, _ = encode_group(x, codec, G, rounding="stochastic", key=99, dtype=torch.float64)
    # values of all codes in every group, by their definition
    number = torch.arange(128, dtype=torch.float64)
    value = number / (254 - number) * amax[:, None].double()
    grouped = x.float().double().view(-1, G)
    below = torch.searchsorted(value, grouped, right=True) - 1
    low, high = value.gather(1, below), value.gather(1, (below + 1).clamp(max=127))
    probability = (grouped - low) / torch.where(high > low, high - low, 1)
    want = below + (uniform8(99, x.numel()).view(-1, G) < probability)
    # a double's last bit where an element lies on a code's value
    assert (codes.view(-1, G) != want).float().mean() < 1e-4


def test_float64_reference_differs_from_float32_by_at_most_a_step() -> None:
    codec = get_codec("e4m3_expand")
    x = sample(codec, 1 << 16)
    single, double = (encode_group(x, codec, G, dtype=dtype)[0].int() for dtype in (torch.float32, torch.float64))
    difference = (single - double).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 2e-4  # log2's last bit, times k, near a rounding boundary
