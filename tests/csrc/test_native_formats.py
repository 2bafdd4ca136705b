"""Quantize and dequantize in C++ against the float64 reference, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from coat_kernels._native import native
from coat_kernels.formats.codecs import CODECS, GROUP_SIZES, Codec
from coat_kernels.formats.reference import decode_group, encode_group, unpack_codes
from tests.codes import places

CODEC_LIST = [codec for codec in CODECS.values() if codec.quantized and not codec.blockwise]

DECODE_RTOL = 4e-6  # the page's bound on folded factors
DENORMAL_STEP = 2.0**-149
# The page's bound. Own errors: the polynomials' (1.25e-5 octave), the fixed point's (2^-15 code).
CODE_MISMATCH = 0.002

every_codec = pytest.mark.parametrize("codec", CODEC_LIST, ids=lambda codec: codec.name)
pytestmark = pytest.mark.usefixtures("isa")


def log_uniform(n, octaves, codec, seed=0):
    """Magnitudes spread evenly over `octaves` octaves below 1, signed where the codec is."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.exp2(-octaves * torch.rand(n, generator=generator, dtype=torch.float64)).float()
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return x * sign if codec.signed else x


def assert_codes_match(got, expected, codec, limit=CODE_MISMATCH):
    got, expected = places(got, codec), places(expected, codec)
    differs = got.view(-1) != expected.view(-1)
    assert differs.float().mean() <= limit
    assert torch.all((got.view(-1) - expected.view(-1)).abs() <= 1)


@every_codec
@pytest.mark.parametrize("octaves", [0.3, 1.0, 3.0, 8.0, 20.0, 60.0])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_encode(kernels, codec, octaves, group_size):
    x = log_uniform(64 * 256, octaves, codec)
    codes, amax, k16 = kernels.quantize(x, codec, group_size)
    expected = encode_group(x, codec, group_size, dtype=torch.float64)
    assert torch.equal(amax, expected[1]) and torch.equal(k16, expected[2])
    assert_codes_match(codes, expected[0], codec)


@every_codec
@pytest.mark.parametrize("scale", [1e-43, 1e-38, 1e-30, 1e-10, 1e10, 1e38])
def test_encode_extreme_scales(kernels, codec, scale):
    x = (log_uniform(4096, 12, codec).double() * scale).float()
    codes, amax, k16 = kernels.quantize(x, codec)
    expected = encode_group(x, codec, 128, dtype=torch.float64)
    assert torch.equal(amax, expected[1]) and torch.equal(k16, expected[2])
    assert_codes_match(codes, expected[0], codec)


@every_codec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_all_16_bit_inputs(kernels, codec, dtype):
    """All 65,536 patterns: in order (groups of like magnitude, with NaN and inf) and shuffled (groups of every magnitude)."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[: 32768 if not codec.signed else None]
    shuffled = patterns[torch.randperm(patterns.numel(), generator=torch.Generator().manual_seed(1))]
    for x in (patterns, shuffled):
        codes, amax, k16 = kernels.quantize(x, codec)
        expected = encode_group(x, codec, 128, dtype=torch.float64)
        assert torch.equal(amax, expected[1]) and torch.equal(k16, expected[2])
        assert_codes_match(codes, expected[0], codec)


@every_codec
def test_unsigned_keeps_nonzero(kernels, codec):
    x = log_uniform(4096, 40, codec).abs()
    codes, _, k16 = kernels.quantize(x, codec, signed=False)
    expected = encode_group(x, codec, 128, signed=False, dtype=torch.float64)
    assert torch.equal(k16, expected[2]) and torch.all(places(codes, codec) > 0)
    assert_codes_match(codes, expected[0], codec)


@every_codec
@pytest.mark.parametrize("amax", [2.0**-149, 1e-40, 2.0**-126, 1e-36, 1e-27, 1e-20, 1.0, 3.3, 1e20, 3.4028234e38])
def test_decode_every_code(kernels, codec, amax):
    """256 codes x 255 metadata bytes x amax over the whole range."""
    written = torch.arange(256, dtype=torch.uint8)  # of e2m1 pairs of codes, all of them
    if codec.name == "softsign8":
        written[128] = 0  # -128 is never written
    codes = written.repeat(255)
    k16 = torch.arange(1, 256, dtype=torch.uint8)
    top = torch.full((255,), amax)
    group_size = 256
    if codec.bits == 4:  # 512 codes: two groups
        top, k16 = top.repeat_interleave(2), k16.repeat_interleave(2)
    got = kernels.dequantize(codes, top, k16, codec, group_size).double()
    expected = decode_group(codes, top, k16, codec, group_size, dtype=torch.float64)
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    # Codes above the maximum that no encoder writes may pass float32's range.
    fits = expected.abs() <= torch.finfo(torch.float32).max
    error = (got - expected).abs()[fits]
    assert torch.all(error <= DECODE_RTOL * expected.abs()[fits] + DENORMAL_STEP)
    is_max = places(codes, codec) == codec.max_code
    assert torch.all(got[is_max] == float(top[0])) or (codec.is_float and not codec.expand)


@every_codec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_to_16_bit(kernels, codec, dtype):
    x = log_uniform(1000, 10, codec)
    stored = kernels.quantize(x, codec)
    assert torch.equal(kernels.dequantize(*stored, codec, dtype=dtype), kernels.dequantize(*stored, codec).to(dtype))
    odd = kernels.dequantize(*stored, codec, dtype=dtype, numel=999)
    assert torch.equal(odd, kernels.dequantize(*stored, codec, dtype=dtype)[:999])


@every_codec
@pytest.mark.parametrize("numel", [0, 1, 31, 127, 128, 129, 300])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_sizes(kernels, codec, numel, group_size):
    x = log_uniform(numel, 6, codec)
    stored = kernels.quantize(x, codec, group_size)
    expected = encode_group(x, codec, group_size, dtype=torch.float64)
    for got, want in zip(stored, expected, strict=True):
        assert got.shape == want.shape
    assert torch.equal(stored[1], expected[1]) and torch.equal(stored[2], expected[2])
    assert (stored[0] != expected[0]).sum() <= 1
    decoded = kernels.dequantize(*stored, codec, group_size, numel=numel)
    want = decode_group(*stored, codec, group_size, shape=(numel,))
    torch.testing.assert_close(decoded, want, rtol=2 * DECODE_RTOL, atol=0)


@every_codec
@pytest.mark.parametrize("value", [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-39, 1e-20, 3e38, "equal"])
def test_degenerate_at_every_position(kernels, codec, value):
    """Row g of the input has the special value at position g of its group."""
    x = log_uniform(128 * 128, 5, codec, seed=3).view(128, 128)
    if value == "equal":
        x[:] = 0.37
        if codec.signed:
            x *= torch.where(torch.rand_like(x) < 0.5, -1.0, 1.0)
        x.fill_diagonal_(0.0)
    else:
        x.fill_diagonal_(abs(value) if not codec.signed else value)
    codes, amax, k16 = kernels.quantize(x, codec)
    expected = encode_group(x, codec, 128, dtype=torch.float64)
    assert torch.equal(amax, expected[1]) and torch.equal(k16, expected[2])
    assert_codes_match(codes, expected[0], codec)
    special = unpack_codes(codes, codec, (128, 128)).diagonal()
    assert torch.equal(special, unpack_codes(expected[0], codec, (128, 128)).diagonal())
    if value == "equal":
        back = kernels.dequantize(codes, amax, k16, codec).view(x.shape)
        assert torch.equal(back, x) or (codec.name == "e2m1" and torch.allclose(back, x, rtol=1.2e-7, atol=0))
    elif not torch.tensor(value).isfinite():
        assert torch.all(special == codec.nan_code)


@every_codec
def test_constant_groups_round_trip(kernels, codec):
    """Any magnitude, one a group, any signs: exact. Without expansion, where the smallest code value is a normal float32."""
    generator = torch.Generator().manual_seed(5)
    smallest = 0x18000000 if codec.is_float and not codec.expand else 1
    bits = torch.randint(smallest, 0x7F800000, (1024, 1), generator=generator, dtype=torch.int32)
    x = bits.view(torch.float32).expand(1024, 32).clone()
    if codec.signed:
        x *= torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1
    for rounding in ("nearest", "stochastic"):
        stored = kernels.quantize(x, codec, 32, rounding=rounding, key=7)
        back = kernels.dequantize(*stored, codec, 32).view(x.shape)
        # a sixth of amax, times six, is amax to a rounding
        assert torch.equal(back, x) or (codec.name == "e2m1" and torch.allclose(back, x, rtol=1.2e-7, atol=0))


@every_codec
def test_zero_and_nan_groups(kernels, codec):
    x = torch.zeros(3, 64)
    x[1] = torch.nan
    x[2, ::2] = torch.nan
    codes, amax, k16 = kernels.quantize(x, codec, 64)
    assert torch.equal(amax, torch.zeros(3)) and torch.equal(k16, torch.full((3,), 1 if codec.name == "log8" else 16, dtype=torch.uint8))
    assert torch.equal(unpack_codes(codes, codec, (3, 64)), torch.where(x.isnan(), codec.nan_code, 0).to(torch.uint8))
    decoded = kernels.dequantize(codes, amax, k16, codec, 64).view(3, 64)
    assert torch.equal(decoded.isnan(), x.isnan() & codec.is_float8)
    assert torch.all(decoded[0] == 0) and not torch.any(torch.signbit(decoded[0]))


@every_codec
@pytest.mark.parametrize("octaves", [0.5, 8.0, 25.0])
@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_draws_are_the_reference_s(kernels, codec, octaves, signed):
    x = log_uniform(128 * 100 + 37, octaves, codec)
    codes, amax, k16 = kernels.quantize(x, codec, signed=signed, rounding="stochastic", key=0x12345678)
    expected = encode_group(x, codec, 128, signed=signed, rounding="stochastic", key=0x12345678, dtype=torch.float64)
    assert torch.equal(amax, expected[1]) and torch.equal(k16, expected[2])
    assert_codes_match(codes, expected[0], codec)
    other = encode_group(x, codec, 128, signed=signed, rounding="stochastic", key=0x12345679, dtype=torch.float64)[0]
    assert (codes != other).float().mean() > 0.05  # the comparison can fail


@every_codec
def test_threads_do_not_change_anything(kernels, codec):
    x = log_uniform(300_001, 9, codec)
    for one, two in zip(
        kernels.quantize(x, codec, rounding="stochastic", key=3),
        kernels.quantize(x, codec, rounding="stochastic", key=3, threads=2),
        strict=True,
    ):
        assert torch.equal(one, two)


def test_unaligned_input(kernels):
    codec = CODECS["e4m3_expand"]
    flat = log_uniform(1001, 9, codec)
    for got, want in zip(kernels.quantize(flat[1:], codec), kernels.quantize(flat[1:].clone(), codec), strict=True):
        assert torch.equal(got, want)


def test_unknown_isa_is_refused():
    with pytest.raises(ValueError, match="no kernels for instruction set 'mmx'.*choose one of .*generic"):
        native.use_isa("mmx")


def test_unknown_numbers_are_refused(kernels):
    for index in (-1, 0, CODECS["dynamic8"].index, CODECS["bfloat16"].index, 11):
        with pytest.raises(ValueError, match=f"unknown codec number {index}"):
            kernels.quantize(torch.zeros(4), Codec("other", index))
    with pytest.raises(ValueError, match="group size 48 is not offered; choose one of 32"):
        kernels.quantize(torch.zeros(4), CODECS["log8"], 48)
