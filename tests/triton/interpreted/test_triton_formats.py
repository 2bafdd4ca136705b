"""Group quantize, dequantize and the plain forms in the interpreter, against the PyTorch reference in float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from coat_kernels.formats.codecs import CODECS, GROUP_SIZES, Codec
from coat_kernels.formats.reference import decode_group, encode_group, pack_codes, unpack_codes
from coat_kernels.formats.triton import decode_plain, encode_plain, expansion_k16, plain_range
from coat_kernels.ops.group_quant import triton as kernel
from tests.codes import places

QUANTIZED = [codec for codec in CODECS.values() if codec.quantized and not codec.blockwise]
PLAIN = [codec for codec in QUANTIZED if codec.expand or codec.name == "log8"]
SIGNS = [(codec, signed) for codec in QUANTIZED for signed in ((True, False) if codec.signed else (False,))]
BY_SIGN = pytest.mark.parametrize("codec, signed", SIGNS, ids=[f"{c.name}-{'signed' if s else 'unsigned'}" for c, s in SIGNS])

#: README.md: "How far backends may differ", and the accuracy of decode.
CODES_APART = 0.002
DECODE_RTOL = 4e-6
DENORMAL_STEP = 2.0**-149


def decode_tolerance(want: Tensor, k16: Tensor, codec: Codec) -> Tensor:
    """For values [n_groups · 256]. Under k16 = 12 (groups over 22 octaves) the error of the logarithm's unit counts 1/k times."""
    scale = (12 / k16.double()).clamp(min=1) if codec.expand else torch.ones(len(k16), dtype=torch.float64)
    return DECODE_RTOL * scale.repeat_interleave(256) * want.abs() + DENORMAL_STEP


def check_encode(x: Tensor, codec: Codec, signed: bool, group_size: int = 128, rounding: str = "nearest") -> Tensor:
    key = 0x9E3779B1
    codes, amax, k16 = kernel.quantize_group(x, codec, group_size, signed, rounding, key)
    want, want_amax, want_k16 = encode_group(x, codec, group_size, signed=signed, rounding=rounding, key=key, dtype=torch.float64)
    assert torch.equal(amax, want_amax) and torch.equal(k16, want_k16)
    special = ~torch.isfinite(x.float()) | (x == 0)
    elements, wanted = unpack_codes(codes, codec, x.shape), unpack_codes(want, codec, x.shape)
    assert torch.equal(elements[special], wanted[special])
    # "GPU kernels flush subnormals in log2: such an element takes the lowest code"
    place = places(codes, codec, x.shape)
    flushed = (x != 0) & (x.float().abs() < 2.0**-126) & (place.abs() == 1)
    off = (place - places(want, codec, x.shape)).abs()[~flushed]
    assert off.numel() == 0 or int(off.max()) <= 1
    assert int((off > 0).sum()) <= max(1, CODES_APART * off.numel())
    return codes


def samples(numel: int, width: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * torch.exp(width * torch.randn(numel, generator=generator))
    x[7::31] = 0
    return x


@BY_SIGN
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("width", [0.0, 1.0, 4.0, 12.0])
def test_codes(codec: Codec, signed: bool, rounding: str, width: float) -> None:
    x = samples(20_000, width)
    check_encode(x if signed else x.abs(), codec, signed, rounding=rounding)


@BY_SIGN
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 2049])
def test_sizes(codec: Codec, signed: bool, numel: int, group_size: int) -> None:
    if group_size != 128 and numel in (1, 127, 128):
        pytest.skip("the other group sizes take the edges of 129 and 2049")
    x = samples(numel, 2.0)
    x = x if signed else x.abs()
    codes = check_encode(x, codec, signed, group_size)
    _, amax, k16 = encode_group(x, codec, group_size, signed=signed)
    values = kernel.dequantize_group(codes, amax, k16, codec, group_size, torch.float32, x.shape)
    want = decode_group(codes, amax, k16, codec, group_size, shape=x.shape, dtype=torch.float64)
    torch.testing.assert_close(values.double(), want, rtol=DECODE_RTOL, atol=DENORMAL_STEP)


#: What a group of otherwise like numbers may hold, one at a time, at each of its positions.
ODD = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, 3.4e38, 1e-30, 1.0)


@BY_SIGN
@pytest.mark.parametrize("others", ["zeros", "equal", "ordinary", "subnormal"])
def test_one_odd_value_at_every_position(codec: Codec, signed: bool, others: str) -> None:
    size = 32
    rows = {
        "zeros": torch.zeros(size, size),
        "equal": torch.full((size, size), 0.37) * torch.tensor([1.0, -1.0]).repeat(size // 2),
        "ordinary": samples(size * size, 1.0).view(size, size),
        "subnormal": torch.full((size, size), 3e-42),
    }[others]
    groups = torch.stack([rows.clone().fill_diagonal_(value) for value in ODD])
    groups = groups if signed else groups.abs()
    codes = check_encode(groups, codec, signed, size)
    flat = codes.reshape(-1)
    _, amax, k16 = encode_group(groups, codec, size, signed=signed)
    back = kernel.dequantize_group(flat, amax, k16, codec, size, torch.float32, groups.shape)
    finite = torch.isfinite(groups)
    assert bool(torch.isfinite(back[finite]).all())
    zeros = back[groups == 0]
    assert bool((zeros == 0).all()) and not bool(torch.signbit(zeros).any())
    lossless = codec.expand or not codec.is_float
    if codec.expand or not signed:
        assert bool((places(codes, codec, groups.shape) != 0)[finite & (groups != 0)].all())
    if others == "equal" and lossless:
        same = torch.isin(torch.tensor(ODD), torch.tensor([0.0, float("inf"), -float("inf")])) | torch.isnan(torch.tensor(ODD))
        kept = finite & (groups != 0) & same[:, None, None]
        assert torch.equal(back[kept], groups[kept])


@BY_SIGN
def test_every_bfloat16(codec: Codec, signed: bool) -> None:
    patterns = torch.arange(65536)[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    for order in (torch.arange(65536), patterns):
        x = torch.where(order >= 32768, order - 65536, order).to(torch.int16).view(torch.bfloat16)
        check_encode(x if signed else x.abs(), codec, signed)


@pytest.mark.parametrize("codec", QUANTIZED, ids=lambda codec: codec.name)
@pytest.mark.parametrize("top", [2.0**-149, 3e-39, 2.0**-126, 1e-20, 1.0, 3.0, 1e20, 3.4028234663852886e38])
def test_every_code_with_every_metadata(codec: Codec, top: float) -> None:
    metadata = torch.arange(1, 256)
    if codec.bits == 4:  # all pairs of codes: two groups
        metadata = metadata.repeat_interleave(2)
    codes = torch.arange(256).repeat(255).to(torch.uint8)
    if codec.name == "softsign8":  # -128 is never written
        codes[codes == 128] = 0
    amax = torch.full((len(metadata),), top)
    k16 = metadata.to(torch.uint8) if codec.expand or codec.name == "log8" else torch.full_like(metadata, 16).to(torch.uint8)
    shape = (len(metadata) * 256,)
    got = kernel.dequantize_group(codes, amax, k16, codec, 256, torch.float32, shape)
    want = decode_group(codes, amax, k16, codec, 256, shape=shape, dtype=torch.float64)
    assert torch.equal(got.isnan(), want.isnan())
    want = want.nan_to_num()
    assert bool(((got.double().nan_to_num() - want).abs() <= decode_tolerance(want, k16, codec)).all())
    exact = places(codes, codec, shape) == codec.max_code
    assert bool((got[exact] == top).all()) if codec.expand or not codec.is_float else True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize_rounds_to_nearest(dtype: torch.dtype) -> None:
    codec = CODECS["e4m3_expand"]
    x = samples(2000, 1.0)
    codes, amax, k16 = encode_group(x, codec, 128)
    exact = kernel.dequantize_group(codes, amax, k16, codec, 128, torch.float32, x.shape)
    got = kernel.dequantize_group(codes, amax, k16, codec, 128, dtype, x.shape).float()
    half_step = torch.finfo(dtype).eps / 2
    assert bool(((got - exact).abs() <= (half_step + DECODE_RTOL) * exact.abs()).all())
    assert int((got == exact.to(dtype).float()).sum()) >= 0.99 * len(got)


@triton.jit
def _k16_kernel(out_ptr, CODEC: tl.constexpr, ISA: tl.constexpr):
    spread = (tl.program_id(0) * 65536 + tl.arange(0, 65536)) << 8
    k16 = expansion_k16(spread, spread + 1, CODEC, ISA)
    tl.store(out_ptr + (spread >> 8), k16)


@pytest.mark.parametrize("codec", [c for c in QUANTIZED if c.expand], ids=lambda codec: codec.name)
def test_k16_is_the_exact_floor_for_every_range(codec: Codec) -> None:
    programs = 17  # the cut at 32 octaves is at 16
    got = torch.empty(programs * 65536)
    _k16_kernel[(programs,)](got, codec.index, kernel.instruction_set(got))
    units = torch.arange(len(got)).clamp(1, 32 << 15)
    assert torch.equal(got.long(), (codec.range_q15 // units).clamp(1, 255))


@triton.jit
def _plain_kernel(
    x_ptr,
    codes_ptr,
    k16_ptr,
    irregular_ptr,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    ISA: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = row[:, None] * G + tl.arange(0, G)[None, :]
    x = tl.load(x_ptr + offsets)
    max_bits, spread, _, irregular = plain_range(x, row * 0.0 + 1.0, CODEC, SIGNED, ISA)
    key = tl.full([], 77, tl.uint32)
    codes, k16 = encode_plain(x, max_bits, spread, key, 0, offsets, CODEC, SIGNED, STOCHASTIC, ISA)
    tl.store(codes_ptr + offsets, codes)
    tl.store(k16_ptr + row, k16.to(tl.uint8))
    tl.store(irregular_ptr + row, irregular)


@pytest.mark.parametrize("codec", PLAIN, ids=lambda codec: codec.name)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("width", [0.0, 0.01, 1.0, 2.0])
def test_plain_encode(codec: Codec, stochastic: bool, width: float) -> None:
    if stochastic and codec.is_float:
        pytest.skip("FP8 codes rounded by chance take the checked form")
    x = samples(128 * 128, width)
    x[128:256] = 0
    x[256:384] = 0.1
    x = x if codec.signed else x.abs()
    codes, k16 = torch.empty(x.shape, dtype=torch.uint8), torch.empty(128, dtype=torch.uint8)
    irregular = torch.empty(128, dtype=torch.int32)
    _plain_kernel[(2,)](x, codes, k16, irregular, codec.index, codec.signed, stochastic, 128, 64, kernel.instruction_set(x))
    assert bool((irregular < 0).all())
    rounding = "stochastic" if stochastic else "nearest"
    want, _, want_k16 = encode_group(x, codec, 128, signed=codec.signed, rounding=rounding, key=77, dtype=torch.float64)
    assert torch.equal(k16, want_k16)
    off = (places(pack_codes(codes, codec), codec) - places(want, codec)).abs()
    assert int(off.max()) <= 1 and int((off > 0).sum()) <= CODES_APART * off.numel()


@pytest.mark.parametrize("codec", PLAIN, ids=lambda codec: codec.name)
@pytest.mark.parametrize(
    "others, value, irregular_to",
    [
        (1.0, float("nan"), "all"),
        (1.0, float("inf"), "all"),
        (1.0, -float("inf"), "all"),
        (1e-37, 1e-39, "all"),  # the logarithm unit takes a subnormal for zero
        (1.0, 1e-10, "float"),  # 33 octaves: beyond the cut of the expanded formats, nothing to log8
        (1.0, 1e-13, "all"),
        (1.0, 1e-9, "none"),
        (0.0, 0.0, "none"),
        (1e-37, 1e37, "all"),
    ],
)
def test_irregular_groups_are_told(codec: Codec, others: float, value: float, irregular_to: str) -> None:
    x = torch.full((128, 128), others)
    x.fill_diagonal_(value)
    x = x if codec.signed else x.abs()
    irregular = torch.empty(128, dtype=torch.int32)
    codes, k16 = torch.empty(x.shape, dtype=torch.uint8), torch.empty(128, dtype=torch.uint8)
    _plain_kernel[(2,)](x, codes, k16, irregular, codec.index, codec.signed, False, 128, 64, kernel.instruction_set(x))
    expected = irregular_to == "all" or (irregular_to == "float" and codec.is_float)
    assert torch.equal(irregular >= 0, torch.full((128,), expected))


@triton.jit
def _decode_kernel(
    codes_ptr,
    amax_ptr,
    k16_ptr,
    out_ptr,
    unit_ptr,
    irregular_ptr,
    CODEC: tl.constexpr,
    SIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    ISA: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    k16 = tl.load(k16_ptr + row).to(tl.int32)
    values, unit, irregular = decode_plain(tl.load(codes_ptr + offsets), tl.load(amax_ptr + row), k16, CODEC, SIGNED, ISA)
    tl.store(out_ptr + offsets, values)
    tl.store(unit_ptr + row, unit)
    tl.store(irregular_ptr + row, irregular)


@pytest.mark.parametrize("codec", PLAIN, ids=lambda codec: codec.name)
@pytest.mark.parametrize("top", [0.0, 1e-42, 1e-30, 1e-12, 0.7, 5.0, 1e30])
def test_plain_decode_of_every_code(codec: Codec, top: float) -> None:
    # an expansion over 32 octaves is never written
    metadata = torch.arange(256).clamp(min(codec.range_q15 >> 20, 8) if codec.is_float else 1, 252)
    codes = (torch.arange(256) % (1 << codec.bits)).repeat(len(metadata)).to(torch.uint8)
    amax, k16 = torch.full((len(metadata),), top), metadata.to(torch.uint8)
    got, unit = torch.empty(codes.shape), torch.empty(amax.shape)
    irregular = torch.empty(len(amax), dtype=torch.int32)
    args = (codec.index, codec.signed, 64, kernel.instruction_set(got))
    _decode_kernel[(4,)](codes, amax, k16, got, unit, irregular, *args)
    assert torch.equal(irregular >= 0, (k16 > 40) & (not codec.is_float) | torch.full_like(k16, top == 1e30, dtype=torch.bool))
    keep = (irregular < 0).repeat_interleave(256)
    want = decode_group(pack_codes(codes, codec), amax, k16, codec, 256, dtype=torch.float64)
    values = got.double() * unit.double().repeat_interleave(256)
    finite = torch.isfinite(want)
    assert not bool(torch.isfinite(values[keep & ~finite]).any())
    keep &= finite
    # the interpreter rounds a product of up to 41 octaves that a GPU fuses into the sum
    unfused = 0.0 if codec.is_float else 2.0**-19 * 0.7
    assert bool(((values - want).abs() <= decode_tolerance(want, k16, codec) + unfused * want.abs())[keep].all())
