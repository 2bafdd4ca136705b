"""The ops `norm`, `norm_from_codes` and `norm_backward`: every backend against float64, with bounds that follow from the formats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.scaled8 import ROW_GROUP_SIZES, SCALED_FORMATS, decode, encode
from coat_kernels.ops.norm import reference
from coat_kernels.ops.norm.settings import NormSettings
from tests.rounding import U32, coded, same, same_codes, sqnr, stored, sum_units, within

OPS = torch.ops.coat_kernels
EPS = 1e-6
ROWS = (2, 3)
WIDTHS = (1, 7, 16, 96, 100, 128, 3072, 4104)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: center, plus_one, segments of gain (0: none), segments of shift.
KINDS = {
    "rms": (False, False, 1, 0),
    "rms-frozen-none": (False, False, 0, 0),
    "gemma": (False, True, 1, 0),
    "layer": (True, False, 1, 1),
    "layer-none": (True, False, 0, 0),
    "layer-shift": (True, False, 0, 2),
    "modulate": (True, True, 2, 2),
    "modulate-tokens": (True, True, 6, 6),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Case:
    """Inputs of one norm and what it is in float64."""

    def __init__(self, kind: str, row: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.center, self.plus_one, gain, shift = KINDS[kind]
        self.dtype, self.segments = dtype, max(gain, shift, 1)
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        outliers = torch.exp(torch.randn(row, generator=generator))
        self.x = (draw(*ROWS, row) * outliers + 0.5).to(device, dtype)
        self.dy = draw(*ROWS, row).to(device, dtype)
        self.gain = (0.2 * draw(gain, row) + (not self.plus_one)).to(device, dtype) if gain else None
        self.shift = draw(shift, row).to(device) if shift else None
        rows = self.x.double().view(-1, row)
        centered = rows - rows.mean(-1, keepdim=True) if self.center else rows
        self.rstd = (centered.square().mean(-1) + EPS).rsqrt()
        self.xhat = centered * self.rstd[:, None]
        # of the mean: its float32 sum; of the difference and the products: a few units
        spread = rows.abs().mean(-1, keepdim=True) * self.rstd[:, None] if self.center else 0
        self.xhat_error = sum_units(row) * (self.xhat.abs() + spread) + 8 * U32 * self.xhat.abs()
        self.factor = self._spread(self.gain) + self.plus_one if self.gain is not None else torch.ones_like(self.xhat)
        self.offset = self._spread(self.shift) if self.shift is not None else torch.zeros_like(self.xhat)
        self.y = self.xhat * self.factor + self.offset

    def _spread(self, factor: Tensor) -> Tensor:
        rows = math.prod(ROWS)
        return factor.double().repeat_interleave(rows // factor.shape[0], 0)

    def run(self, fmt: str = "e4m3", group_size: int = 128, amax: bool = False, save: bool = True) -> tuple[Tensor, ...]:
        return OPS.norm(self.x, self.gain, self.shift, self.center, self.plus_one, EPS, fmt, group_size, amax, save)

    def backward(self, kept: tuple[Tensor, ...], fmt: str, group_size: int, needs: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
        codes, scale, rstd = kept
        arguments = (self.dy, codes, scale, rstd, self.gain, self.center, self.plus_one, fmt, group_size, self.segments)
        return OPS.norm_backward(*arguments, *needs)

    def check_backward(self, results: tuple[Tensor, ...], xhat: Tensor, rstd: Tensor, error: Tensor | float = 0.0) -> None:
        """Hold dx, dgain, dshift against float64 for this xhat [R, D], known to `error`."""
        dx, dgain, dshift = results
        row = xhat.shape[-1]
        dy = self.dy.double().view(-1, row)
        grad = dy * self.factor
        along, straight = (grad * xhat).mean(-1, keepdim=True), grad.mean(-1, keepdim=True) if self.center else torch.zeros(1).double()
        inner = grad - straight.to(grad) - xhat * along
        sizes = grad.abs().mean(-1, keepdim=True), (grad * xhat).abs().mean(-1, keepdim=True)
        units = sum_units(row)
        rounding = 8 * U32 * (grad.abs() + straight.to(grad).abs() + (xhat * along).abs()) + units * (sizes[0] + xhat.abs() * sizes[1])
        off = (grad.abs() * error).mean(-1, keepdim=True)
        known = error * along.abs() + (xhat.abs() + error) * off
        want = inner * rstd.double().view(-1, 1)
        bound = rstd.double().view(-1, 1) * (rounding + known) * (1 + 4 * U32)
        assert within(dx.view(want.shape), want, bound + stored(want.abs() + bound, dx.dtype))
        for got, terms, wrong in ((dgain, dy * xhat, dy.abs() * error), (dshift, dy, 0.0)):
            if got.numel():
                runs = terms.view(self.segments, -1, row)
                allowed = sum_units(runs.shape[1]) * runs.abs().sum(1)
                if isinstance(wrong, Tensor):
                    allowed = allowed + wrong.view(runs.shape).sum(1)
                assert within(got, runs.sum(1), allowed + 2.0**-140)


@kinds
@pytest.mark.parametrize("row", WIDTHS)
def test_forward_against_float64(kind: str, row: int, machine: torch.device) -> None:
    for dtype in DTYPES:
        case = Case(kind, row, dtype, machine)
        y, codes, scale, rstd, y_amax = case.run(amax=True)
        bound = case.xhat_error * case.factor.abs() + 4 * U32 * (case.y.abs() + case.offset.abs())
        assert y.dtype == dtype and y.shape == case.x.shape
        assert within(y.view(case.y.shape), case.y, bound + stored(case.y.abs() + bound, dtype))
        assert within(rstd, case.rstd, (sum_units(row) + 8 * U32) * case.rstd)
        decoded = decode(codes, scale, "e4m3", 128, torch.float64).view(case.xhat.shape)
        assert within(decoded, case.xhat, coded(case.xhat, scale.view(len(case.rstd), -1), "e4m3", 128) + 2 * case.xhat_error)
        groups = torch.nn.functional.pad(y.float(), (0, -row % 128)).unflatten(-1, (-1, 128))
        assert torch.equal(y_amax, groups.abs().amax(-1))


@pytest.mark.parametrize("fmt", SCALED_FORMATS)
@pytest.mark.parametrize("group_size", ROW_GROUP_SIZES)
def test_codes_are_those_of_the_format(fmt: str, group_size: int, machine: torch.device) -> None:
    """What is kept is the encoding of the kernel's own xhat, bit by bit; the values come back as `norm_from_codes`."""
    for row in (7, 100, 4104):
        case = Case("modulate", row, torch.bfloat16, machine)
        y, codes, scale, rstd, _ = case.run(fmt, group_size)
        case.x, dtype = case.x.float(), case.dtype
        _, xhat, empty, rstd_none, _ = case.run("none", group_size)
        want, want_scale = encode(xhat, fmt, group_size)
        assert same_codes(codes, want) and same(scale, want_scale)
        assert same(rstd, rstd_none) and empty.numel() == 0
        again = OPS.norm_from_codes(codes, scale, case.gain, case.shift, True, fmt, group_size, dtype)
        values = decode(codes, scale, fmt, group_size, torch.float64).view(case.xhat.shape)
        exact = values * case.factor + case.offset
        assert again.dtype == y.dtype
        assert within(again.view(exact.shape), exact, 4 * U32 * (exact.abs() + case.offset.abs()) + stored(exact, dtype))


@kinds
@pytest.mark.parametrize("row", WIDTHS)
def test_backward_against_float64(kind: str, row: int, machine: torch.device) -> None:
    """Against the values of the codes themselves, then against the exact xhat with the format's error in the bound."""
    for dtype in DTYPES:
        for fmt, group_size in (("e4m3", 128), ("auto", 16), ("none", 128)):
            case = Case(kind, row, dtype, machine)
            _, codes, scale, rstd, _ = case.run(fmt, group_size)
            kept = codes.double() if fmt == "none" else decode(codes, scale, fmt, group_size, torch.float64)
            needs = (case.gain is not None, case.shift is not None, True)
            results = case.backward((codes, scale, rstd), fmt, group_size, needs)
            case.check_backward(results, kept.view(case.xhat.shape), rstd)
            if fmt != "none":
                error = coded(case.xhat, scale.view(len(case.rstd), -1), fmt, group_size) + 2 * case.xhat_error
                case.check_backward(results, case.xhat, rstd, error)


def test_many_rows_are_summed_in_one_order(machine: torch.device) -> None:
    """More rows than a block holds, in segments; a second run gives the same bits, and so does another number of threads."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 1500, 200, generator=generator).to(machine) for _ in range(2))
    gain = torch.randn(2, 200, generator=generator).to(machine)
    _, codes, scale, rstd, _ = OPS.norm(x, gain, None, True, True, EPS, "e4m3", 64, False)
    arguments = (dy, codes, scale, rstd, gain, True, True, "e4m3", 64, 2, True, True)
    threads = torch.get_num_threads()
    first = OPS.norm_backward(*arguments)
    torch.set_num_threads(3)
    second = OPS.norm_backward(*arguments)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    xhat = decode(codes, scale, "e4m3", 64, torch.float64)
    for got, terms in ((first[1], dy.double() * xhat), (first[2], dy.double())):
        assert within(got, terms.sum(1), sum_units(1500) * terms.abs().sum(1))


@pytest.mark.parametrize("needs", [(g, s, x) for g in (False, True) for s in (False, True) for x in (False, True)])
def test_nothing_is_computed_that_is_not_needed(needs: tuple[bool, bool, bool], machine: torch.device) -> None:
    case = Case("modulate", 100, torch.bfloat16, machine)
    kept = case.run("e4m3", 16)[1:4]
    for got, want, need in zip(
        case.backward(kept, "e4m3", 16, needs), case.backward(kept, "e4m3", 16, (True, True, True)), (needs[2], *needs[:2]), strict=True
    ):
        assert same(got, want) if need else got.numel() == 0
    y, codes, scale, rstd, y_amax = case.run(save=False)
    assert same(y, case.run()[0])
    assert codes.numel() == scale.numel() == rstd.numel() == y_amax.numel() == 0


def test_a_row_that_is_not_finite_spoils_no_other(machine: torch.device) -> None:
    case = Case("layer", 300, torch.float32, machine)
    clean = case.run(amax=True)
    case.x[0, 1, 7], case.x[1, 0, 299] = math.nan, math.inf
    spoilt = case.run(amax=True)
    finite = torch.tensor([True, False, True, False, True, True], device=machine)
    for got, want in zip(spoilt, clean, strict=True):
        assert torch.equal(got.view(6, -1)[finite], want.view(6, -1)[finite])
    assert spoilt[0].view(6, -1)[~finite].isnan().all()
    assert (spoilt[4].view(6, -1)[~finite] == 0).all()  # no finite magnitude


@pytest.mark.parametrize("rows", [(0,), (3, 0), (1,)])
def test_shapes(rows: tuple[int, ...], machine: torch.device) -> None:
    x, gain = torch.randn(*rows, 40, device=machine), torch.ones(40, device=machine)
    y, codes, scale, rstd, y_amax = OPS.norm(x, gain, gain, True, False, EPS, "e4m3", 16, True)
    assert y.shape == codes.shape == x.shape and scale.shape == y_amax.shape == (*rows, 3) and rstd.shape == (math.prod(rows),)
    dx, dgain, dshift = OPS.norm_backward(x, codes, scale, rstd, gain, True, False, "e4m3", 16, 1, True, True)
    assert dx.shape == x.shape and dgain.shape == dshift.shape == (1, 40)
    if math.prod(rows) == 0:
        assert not dgain.any() and not dshift.any()


def test_operands_that_are_not_contiguous(machine: torch.device) -> None:
    x, gain = torch.randn(48, 100, device=machine).t(), torch.randn(2, 48, 3, device=machine)[..., 1]
    got = OPS.norm(x, gain, None, True, True, EPS, "auto", 16, False)
    for a, b in zip(got, OPS.norm(x.contiguous(), gain.contiguous(), None, True, True, EPS, "auto", 16, False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fmt", ["e4m3", "none"])
def test_opcheck(fmt: str, device: torch.device) -> None:
    x, gain = torch.randn(4, 50, device=device), torch.randn(2, 50, device=device)
    forward = (x, gain, gain, True, True, EPS, fmt, 16, True)
    torch.library.opcheck(OPS.norm.default, forward)
    _, codes, scale, rstd, _ = OPS.norm(*forward)
    torch.library.opcheck(OPS.norm_from_codes.default, (codes, scale, gain, None, True, fmt, 16, torch.bfloat16))
    torch.library.opcheck(OPS.norm_backward.default, (x, codes, scale, rstd, gain, True, True, fmt, 16, 2, True, False))


def test_outliers_cost_little() -> None:
    """xhat has unit variance and LayerNorm's dx barely reads it: 8 bits of it leave dx far better than 8 bits of anything else would."""
    case = Case("layer", 3072, torch.float32, torch.device("cpu"))
    exact = case.backward(case.run("none")[1:4], "none", 128, (True, True, True))
    for fmt, dx_db, dgain_db in (("e4m3", 50, 28), ("int8", 50, 28), ("auto", 50, 30)):
        got = case.backward(case.run(fmt)[1:4], fmt, 128, (True, True, True))
        assert sqnr(got[0], exact[0]) > dx_db and sqnr(got[1], exact[1]) > dgain_db


def test_the_reference_tells_a_wrong_mean_apart() -> None:
    """The bounds of these tests refuse a forward pass that forgets to subtract the mean from the last element."""
    case = Case("layer-none", 100, torch.float32, torch.device("cpu"))
    settings = NormSettings(plus_one=False, fmt="e4m3", group_size=128, center=True)
    y = reference.norm(case.x, None, None, settings, eps=EPS, amax=False, save=False)[0].view(case.y.shape)
    bound = case.xhat_error + 4 * U32 * case.y.abs()
    assert within(y, case.y, bound + stored(case.y, y.dtype))
    y[:, -1] += 1e-4
    assert not within(y, case.y, bound + stored(case.y, y.dtype))


ONES = torch.ones(2, 3, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.int32)}, TypeError, r"x must be float32, bfloat16 or float16, got torch.int32"),
        ({"x": torch.ones(())}, ValueError, r"x needs a last dimension of at least one element, got shape \(\)"),
        ({"x": torch.ones(3, 0)}, ValueError, r"at least one element, got shape \(3, 0\)"),
        ({"gain": torch.ones(31)}, ValueError, r"gain must have shape \[32\] or \[segments, 32\], got \(31,\)"),
        ({"gain": torch.ones(4, 32)}, ValueError, "gain has 4 segments, which do not divide the 6 rows"),
        ({"shift": torch.ones(2, 32)}, ValueError, "gain has 1 segments and shift 2; they must agree"),
        ({"gain": torch.ones(32, dtype=torch.int64)}, TypeError, "gain must be a floating point tensor, got torch.int64"),
        ({"fmt": "fp8"}, ValueError, "unknown activation format 'fp8'; known formats: none, e4m3"),
        ({"group_size": 48}, ValueError, "group size 48 is not offered"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": ONES, "gain": torch.ones(32), "shift": None, "center": True, "plus_one": False, "eps": EPS}
    arguments |= {"fmt": "e4m3", "group_size": 16, "amax": False, **change}
    with pytest.raises(error, match=message):
        OPS.norm(**arguments)


def test_errors_of_the_backward_pass() -> None:
    _, codes, scale, rstd, _ = OPS.norm(ONES, None, None, True, False, EPS, "e4m3", 16, False)
    common = (None, True, False, "e4m3", 16, 1, False, False)
    with pytest.raises(ValueError, match=r"dy has shape \(2, 3, 31\) and codes \(2, 3, 32\)"):
        OPS.norm_backward(ONES[..., :31], codes, scale, rstd, *common)
    with pytest.raises(ValueError, match=r"in groups of 16 have scales \(2, 3, 2\), got \(2, 3\)"):
        OPS.norm_backward(ONES, codes, scale[..., 0], rstd, *common)
    with pytest.raises(ValueError, match="rstd must have one entry for each of the 6 rows"):
        OPS.norm_backward(ONES, codes, scale, rstd[1:], *common)
    with pytest.raises(ValueError, match="norm_backward has 4 segments, which do not divide the 6 rows"):
        OPS.norm_backward(ONES, codes, scale, rstd, None, True, False, "e4m3", 16, 4, False, True)
