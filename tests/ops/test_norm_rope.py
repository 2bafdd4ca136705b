"""The ops `norm_rope` and `norm_rope_backward`: every backend against float64, with bounds that follow from the dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coat_kernels.ops.norm_rope import check_norm_rope_weight, reference
from coat_kernels.ops.norm_rope.factors import HeadFactors
from tests.rounding import U32, same, sqnr, stored, sum_units, within

OPS = torch.ops.coat_kernels
EPS = 1e-6
#: Angles and pairs: [head_dim, interleaved, rotated, first tokens, batches in the tables]
KINDS = {
    "flux": (128, True, True, 3, 0),
    "llama": (128, False, True, 0, 1),
    "packed": (96, False, True, 2, 2),
    "short": (6, True, True, 4, 0),
    "plain": (7, True, False, 2, 0),
    "wide": (256, True, True, 0, 2),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


class Case:
    def __init__(self, kind: str, dtype: torch.dtype, device: torch.device, tokens: int = 5) -> None:
        head_dim, self.interleaved, rotated, self.first_tokens, batches = KINDS[kind]
        generator = torch.Generator().manual_seed(0)
        self.x, self.dy = (torch.randn(2, tokens, 3, head_dim, generator=generator).to(device, dtype) for _ in range(2))
        weights = [(torch.rand(head_dim, generator=generator) * 1.5 + 0.05).to(device, dtype) for _ in range(2)]
        self.weight, self.first_weight = weights[0], weights[1] if self.first_tokens else None
        self.cos = self.sin = None
        if rotated:
            angle = torch.randn(max(batches, 1), tokens, head_dim // 2, generator=generator)
            angle = angle.repeat_interleave(2, -1) if self.interleaved else torch.cat((angle, angle), -1)
            angle = angle if batches else angle[0]
            # Llama's long contexts scale both: the rotation is no longer orthogonal
            self.cos, self.sin = (1.2 * angle.cos()).to(device), (1.2 * angle.sin()).to(device)

    def factors(self) -> tuple[Tensor | int | None, ...]:
        return self.weight, self.first_weight, self.first_tokens, self.cos, self.sin

    def run(self) -> tuple[Tensor, Tensor]:
        return OPS.norm_rope(self.x, *self.factors(), EPS, self.interleaved)

    def backward(self, y: Tensor, rstd: Tensor, need_weight: bool = True, need_x: bool = True) -> tuple[Tensor, ...]:
        return OPS.norm_rope_backward(self.dy, y, rstd, *self.factors(), self.interleaved, need_weight, need_x)

    def exact(self) -> tuple[Tensor, Tensor]:
        return reference.norm_rope(self.x.double(), HeadFactors(*self.factors(), self.interleaved).each(double), EPS)

    def exact_backward(self, y: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        factors = HeadFactors(*self.factors(), self.interleaved).each(double)
        return reference.norm_rope_backward(self.dy.double(), y.double(), rstd.double(), factors, need_weight=True, need_x=True)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_against_float64(kind: str, dtype: torch.dtype, machine: torch.device) -> None:
    case = Case(kind, dtype, machine)
    y, rstd = case.run()
    want, want_rstd = case.exact()
    head_dim = case.x.shape[-1]
    assert within(rstd, want_rstd, (sum_units(head_dim) + 8 * U32) * want_rstd)
    # a pair's two products, each off by the norm's error, may cancel: |a cos| + |b sin| <= 1.2 · 2 · the head's largest
    norm = want.abs().amax(-1, keepdim=True) if case.cos is None else 2 * want.abs().amax(-1, keepdim=True)
    bound = (sum_units(head_dim) + 8 * U32) * norm
    assert y.dtype == dtype and y.shape == case.x.shape
    assert within(y, want, bound + stored(want.abs() + bound, dtype))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_against_float64(kind: str, dtype: torch.dtype, machine: torch.device) -> None:
    """Against float64 on the same y and rstd. Errors are relative to a head's largest terms: rotations mix its elements."""
    case = Case(kind, dtype, machine)
    y, rstd = case.run()
    dx, dweight, dfirst = case.backward(y, rstd)
    want, want_weight, want_first = case.exact_backward(y, rstd)
    head_dim = case.x.shape[-1]
    smallest = min(w.min().item() for w in (case.weight, case.first_weight) if w is not None)
    grad = 2.4 * case.dy.double().abs().amax(-1, keepdim=True) * max(case.weight.max().item(), 2)
    xhat = 2 * y.double().abs().amax(-1, keepdim=True) / smallest
    units = sum_units(head_dim) + 16 * U32
    bound = rstd.double()[..., None] * units * grad * (1 + xhat**2)
    assert within(dx, want, bound + stored(want.abs() + bound, dtype))
    for got, wanted in ((dweight, want_weight), (dfirst, want_first)):
        assert got.shape == wanted.shape
        terms = (grad * xhat).expand(y.shape).abs().sum((0, 1, 2))
        assert got.numel() == 0 or within(got, wanted, (sum_units(30) + units) * terms)


@kinds
def test_the_input_is_recomputed(kind: str, machine: torch.device) -> None:
    """dx from the output alone is that from the input: over 70 dB in float32 with weights down to 0.05, over 40 dB in bfloat16."""
    for dtype, least in ((torch.float32, 70), (torch.bfloat16, 40)):
        case = Case(kind, dtype, machine)
        exact_y, exact_rstd = case.exact()
        want = case.exact_backward(exact_y, exact_rstd)
        for got, wanted in zip(case.backward(*case.run()), want, strict=True):
            assert got.numel() == 0 or sqnr(got, wanted) > least


def test_nothing_is_computed_that_is_not_needed(machine: torch.device) -> None:
    case = Case("flux", torch.bfloat16, machine)
    kept = case.run()
    dx, dweight, dfirst = case.backward(*kept)
    only_x = case.backward(*kept, need_weight=False)
    assert same(only_x[0], dx) and only_x[1].numel() == only_x[2].numel() == 0
    only_weight = case.backward(*kept, need_x=False)
    assert only_weight[0].numel() == 0
    assert same(only_weight[1], dweight) and same(only_weight[2], dfirst)


def test_many_tokens_are_summed_in_one_order(machine: torch.device) -> None:
    case = Case("flux", torch.bfloat16, machine, tokens=700)
    kept = case.run()
    first, second = case.backward(*kept), case.backward(*kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    want = case.exact_backward(*kept)
    for got, wanted in zip(first[1:], want[1:], strict=True):
        assert sqnr(got, wanted) > 100


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (1, 1, 1, 8)])
def test_shapes(shape: tuple[int, ...], machine: torch.device) -> None:
    x, weight = torch.randn(shape, device=machine), torch.ones(8, device=machine)
    table = torch.ones(shape[1], 8, device=machine)
    y, rstd = OPS.norm_rope(x, weight, None, 0, table, 0 * table, EPS, True)
    assert y.shape == shape and rstd.shape == shape[:-1]
    dx, dweight, dfirst = OPS.norm_rope_backward(x, y, rstd, weight, None, 0, table, 0 * table, True, True)
    assert dx.shape == shape and dweight.shape == (8,) and dfirst.numel() == 0
    if x.numel() == 0:
        assert not dweight.any()


def test_tokens_whose_tables_are_zero_get_no_gradient_and_spoil_none(machine: torch.device) -> None:
    case = Case("flux", torch.float32, machine)
    case.cos[4], case.sin[4] = 0, 0  # padding
    y, rstd = case.run()
    dx, dweight, dfirst = case.backward(y, rstd)
    assert torch.equal(dx[:, 4], torch.zeros_like(dx[:, 4]))
    assert all(gradient.isfinite().all() for gradient in (dx, dweight, dfirst))


def test_opcheck(device: torch.device) -> None:
    case = Case("flux", torch.float32, device)
    forward = (case.x, case.weight, case.first_weight, 3, case.cos, case.sin, EPS, True)
    torch.library.opcheck(OPS.norm_rope.default, forward)
    y, rstd = case.run()
    backward = (case.dy, y, rstd, case.weight, case.first_weight, 3, case.cos, case.sin, True, True)
    torch.library.opcheck(OPS.norm_rope_backward.default, backward)


X = torch.ones(2, 5, 3, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be \[batch, tokens, heads, head_dim\], got shape \(5, 3, 8\)"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must be a float tensor \[8\], got torch.float32 \(7,\)"),
        ({"first_tokens": 2}, ValueError, "first_tokens=2 needs first_weight and at most the 5 tokens of x"),
        ({"first_weight": torch.ones(8), "first_tokens": 6}, ValueError, "first_tokens=6 needs first_weight and at most the 5 tokens"),
        ({"sin": None}, ValueError, "pass both cos and sin, or neither"),
        ({"cos": torch.ones(4, 8)}, ValueError, r"cos must be \[5, 8\] or \[2, 5, 8\], got \(4, 8\)"),
        ({"cos": torch.ones(2, 5, 8)}, ValueError, "must agree in shape and dtype"),
        ({"sin": torch.ones(5, 8, dtype=torch.int64)}, TypeError, "sin must be a float tensor, got torch.int64"),
        ({"x": X[..., :7], "weight": torch.ones(7), "cos": torch.ones(5, 7), "sin": torch.ones(5, 7)}, ValueError, "even size, got 7"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": X, "weight": torch.ones(8), "first_weight": None, "first_tokens": 0, "cos": torch.ones(5, 8), "sin": torch.ones(5, 8)}
    with pytest.raises(error, match=message):
        OPS.norm_rope(**{**arguments, "eps": EPS, "interleaved": True, **change})


def test_a_weight_that_cannot_be_divided_by_is_refused() -> None:
    check_norm_rope_weight(torch.tensor([1.0, -0.01, 0.002]))
    for bad in (0.0, 2.0**-11, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="norm_q has 1 of 2 elements under 2\\^-10 of its largest.*Use rms_norm"):
            check_norm_rope_weight(torch.tensor([1.0, bad]), "norm_q")
