"""The scaled 8-bit formats of activations: exhaustive over inputs and codes, the rule of `auto`, odd inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coat_kernels.formats import scaled8
from coat_kernels.formats.scaled8 import MAX, MIN_AMAX, NAN_CODES, ROW_GROUP_SIZES, SCALED_FORMATS, SINGLE_FORMATS, decode, encode

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
every_format = pytest.mark.parametrize("fmt", SCALED_FORMATS)
every_single = pytest.mark.parametrize("fmt", SINGLE_FORMATS)
every_group = pytest.mark.parametrize("group_size", ROW_GROUP_SIZES)


def every_bfloat16(order: str) -> Tensor:
    """All 65,536 patterns as [256, 256]: neighbours are alike, or of every magnitude."""
    patterns = torch.arange(65536)
    if order == "shuffled":
        patterns = patterns[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    return torch.where(patterns >= 32768, patterns - 65536, patterns).to(torch.int16).view(torch.bfloat16).view(256, 256)


def element_by_element(x: Tensor, fmt: str, group_size: int) -> tuple[Tensor, Tensor]:
    """The page's rule with torch's own conversions, group after group of each row."""
    codes, scales = [], []
    for group in x.float().split(group_size, dim=-1):
        finite = torch.isfinite(group)
        amax = torch.where(finite, group.abs(), 0).amax(-1, keepdim=True).clamp(min=2.0**-100)
        top = torch.full_like(amax, 127.0 if fmt == "int8" else torch.finfo(FLOAT8[fmt]).max)
        q = (group * (top / amax)).clamp(-top, top)
        code = torch.round(q).nan_to_num().to(torch.int8).view(torch.uint8) if fmt == "int8" else q.to(FLOAT8[fmt]).view(torch.uint8)
        code = torch.where((code == 0x80) & (fmt != "int8"), 0, code)
        codes.append(torch.where(finite, code, 0x80 if fmt == "int8" else 0x7F))
        scales.append(amax / top)
    return torch.cat(codes, -1).to(torch.uint8), torch.cat(scales, -1)


@every_single
@every_group
@pytest.mark.parametrize("order", ["alike", "shuffled"])
def test_every_bfloat16_is_clamped_and_cast_as_torch_does(fmt: str, group_size: int, order: str) -> None:
    x = every_bfloat16(order)
    for rows in (x, x.view(1, 65536)[:, :65000].reshape(125, 520), x[:, :250]):
        codes, scale = encode(rows, fmt, group_size)
        want_codes, want_scale = element_by_element(rows, fmt, group_size)
        assert torch.equal(codes, want_codes)
        assert torch.equal(scale, want_scale)


@every_single
def test_every_code_decodes_as_torch_reads_it(fmt: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    scale = torch.tensor([0.37])
    got = decode(codes, scale, fmt, 256)
    number = codes.view(torch.int8).float() if fmt == "int8" else codes.view(FLOAT8[fmt]).float()
    if fmt == "int8":
        number[128] = torch.nan
    assert torch.equal(got.isnan(), number.isnan())
    assert torch.equal(got.nan_to_num(), (number * scale).nan_to_num())
    assert got[NAN_CODES[fmt]].isnan()
    halves = decode(codes, scale, fmt, 256, torch.bfloat16)
    assert torch.equal(halves.nan_to_num(), got.to(torch.bfloat16).nan_to_num())


@every_single
def test_values_on_the_grid_come_back(fmt: str) -> None:
    """Every code of a group that holds its maximum encodes to itself."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = scaled8.values_of(codes, fmt)
    values = torch.where(torch.isfinite(values), values, 0)
    back, scale = encode(values * 2.0**-30, fmt, 256)
    kept = (values != 0) & (codes != 0x80)
    assert torch.equal(back[kept], codes[kept])
    assert scale.item() == 2.0**-30 * (values.abs().max().item() / MAX[fmt])


@every_format
@every_group
def test_rows_are_cut_into_groups_of_their_own(fmt: str, group_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for row in (1, group_size - 1, group_size, group_size + 1, 2 * group_size + 7):
        x = torch.randn(3, 2, row, generator=generator) * torch.exp(2 * torch.randn(3, 2, row, generator=generator))
        codes, scale = encode(x, fmt, group_size)
        assert codes.shape == x.shape
        assert scale.shape == (3, 2, scaled8.num_row_groups(row, group_size))
        for g in range(scale.shape[-1]):
            part = slice(g * group_size, (g + 1) * group_size)
            alone, alone_scale = encode(x[..., part], fmt, group_size)
            assert torch.equal(codes[..., part], alone)
            assert torch.equal(scale[..., g : g + 1], alone_scale)
        assert decode(codes, scale, fmt, group_size).shape == x.shape


@every_format
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 7)])
def test_empty(fmt: str, shape: tuple[int, ...]) -> None:
    codes, scale = encode(torch.zeros(shape), fmt, 32)
    assert codes.shape == shape and scale.shape == (*shape[:-1], -(-shape[-1] // 32))
    assert decode(codes, scale, fmt, 32).shape == shape


@every_format
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_element_spoils_itself_only(fmt: str, odd: float) -> None:
    """At every position of a group; the group with a 0 in its place shows what the neighbours must be."""
    generator = torch.Generator().manual_seed(2)
    row = torch.randn(32, generator=generator)
    rows = row.repeat(32, 1)
    spoilt, zeroed = rows.clone().fill_diagonal_(odd), rows.clone().fill_diagonal_(0)
    codes, scale = encode(spoilt, fmt, 32)
    want, want_scale = encode(zeroed, fmt, 32)
    assert torch.equal(scale, want_scale)
    others = ~torch.eye(32, dtype=torch.bool)
    assert torch.equal(codes[others], want[others])
    int8 = (scale[:, 0].signbit()) | (fmt == "int8")
    assert torch.equal(codes.diagonal(), torch.where(int8, 0x80, 0x7F).to(torch.uint8))
    assert decode(codes, scale, fmt, 32).diagonal().isnan().all()
    alone, _ = encode(torch.full((16,), odd), fmt, 16)
    assert decode(alone, torch.ones(1), fmt, 16).isnan().all()


@every_format
def test_zeros_and_what_rounds_to_zero_are_plus_zero(fmt: str) -> None:
    x = torch.zeros(4, 64)
    x[1] = -0.0
    x[2, 0], x[2, 1], x[2, 2:] = 1.0, -1e-20, -0.0
    x[3] = -1e-44
    codes, scale = encode(x, fmt, 64)
    assert (codes[[0, 1, 3]] == 0).all() and (codes[2, 1:] == 0).all()
    assert (scale.abs() > 0).all() and torch.isfinite(scale).all()
    back = decode(codes, scale, fmt, 64)
    assert not back[codes == 0].signbit().any()


@every_single
def test_tiny_and_huge_groups(fmt: str) -> None:
    for amax in (2.0**-149, 1e-40, MIN_AMAX / 2, MIN_AMAX, 2 * MIN_AMAX, 1e-20, 3.4e38):
        x = amax * torch.linspace(-1, 1, 128)
        codes, scale = encode(x, fmt, 128)
        assert torch.equal(scale, torch.tensor([max(torch.tensor(amax).item(), MIN_AMAX)]) / MAX[fmt])
        want, _ = element_by_element(x, fmt, 128)
        assert torch.equal(codes, want)
        back = decode(codes, scale, fmt, 128)
        assert torch.isfinite(back).all()
        if amax >= MIN_AMAX:
            # half a step: e4m3 2^-4 of the element, e5m2 2^-3, below their normal range the smallest step; int8 1/254 of amax
            step = {"e4m3": (2.0**-4, 2.0**-10 / 448), "e5m2": (2.0**-3, 2.0**-17 / 57344), "int8": (0, 0.5 / 127)}[fmt]
            limit = (x.abs().double() * step[0]).clamp(min=amax * step[1]) * (1 + 2.0**-21)
            assert ((back.double() - x.double()).abs() <= limit).all()


@pytest.mark.parametrize("n", [1, 2, 15, 16, 100, 128, 256])
def test_auto_at_its_boundary(n: int) -> None:
    """The smallest sum of squares that takes int8, and the largest that does not, from groups with one element at amax."""
    limit = (806450 + 5871 * n) // 50  # the largest S that does not take int8
    for target, int8 in ((limit, False), (limit + 1, True)):
        numbers = [127]
        left = target - 127**2
        while left > 0 and len(numbers) < n:
            step = min(127, int(left**0.5))
            numbers.append(-step if len(numbers) % 3 == 0 else step)
            left -= step * step
        if left > 0:
            # no group of n codes reaches the target: too few elements beside the largest
            assert n <= 2
            continue
        x = torch.tensor(numbers + [0] * (n - len(numbers))).float()
        assert int((x.long() ** 2).sum()) == target
        codes, scale = encode(x, "auto", 256 if n > 128 else 128)
        assert scale.signbit().item() is int8
        assert torch.equal(codes, encode(x, "int8" if int8 else "e4m3", 256)[0])
        assert torch.equal(scale.abs(), encode(x, "int8" if int8 else "e4m3", 256)[1])


def test_auto_counts_no_nan_and_the_real_length() -> None:
    full = torch.full((128,), 0.5)
    full[0] = 1
    assert encode(full, "auto", 128)[1].signbit().item()
    mostly_nan = torch.full((128,), torch.nan)
    mostly_nan[0], mostly_nan[1] = 1, 0.5
    assert not encode(mostly_nan, "auto", 128)[1].signbit().item()
    # six elements: S - 127^2 = 1600 > 0.00728 · 127^2 · 6 = 704; as one of 128 it would not
    short = torch.tensor([127.0, 40, 0, 0, 0, 0])
    assert encode(short, "auto", 128)[1].signbit().item()
    assert not encode(torch.nn.functional.pad(short, (0, 122)), "auto", 128)[1].signbit().item()


def error_of(x: Tensor, fmt: str) -> Tensor:
    return (decode(*encode(x, fmt, 128), fmt, 128) - x).double().square().sum(-1)


@pytest.mark.parametrize("width", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_auto_takes_the_better_format(width: float) -> None:
    """Beside an oracle that sees both errors of each group. The rule knows one moment of the group: past width 1 it is off more often."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 128, generator=generator) * torch.exp(width * torch.randn(2000, 128, generator=generator))
    x = x / x.abs().amax(-1, keepdim=True)
    e4m3, int8, auto = (error_of(x, fmt) for fmt in ("e4m3", "int8", "auto"))
    assert auto.sum() <= min(e4m3.sum(), int8.sum())
    if width <= 1:
        assert auto.sum() <= 1.02 * torch.minimum(e4m3, int8).sum()


@every_format
def test_float64_is_computed_in_float64(fmt: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 200, generator=generator, dtype=torch.float64)
    codes, scale = encode(x, fmt, 64)
    assert scale.dtype == torch.float64
    back = decode(codes, scale, fmt, 64, torch.float64)
    assert back.dtype == torch.float64
    single, _ = encode(x.float(), fmt, 64)
    assert (codes != single).float().mean() < 1e-3
    assert (back - x).square().mean().sqrt() < 0.06


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: encode(x, "fp8", 128), "unknown activation format 'fp8'; known formats: e4m3, e5m2, int8, auto"),
        (lambda x: encode(x, "none", 128), "unknown activation format 'none'"),
        (lambda x: encode(x, "e4m3", 8), "group size 8 is not offered; choose one of 16, 32, 64, 128, 256"),
        (lambda x: scaled8.check_format("x", allow_none=True), "known formats: none, e4m3, e5m2, int8, auto"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(256))
    assert scaled8.check_format("none", allow_none=True) == "none"
