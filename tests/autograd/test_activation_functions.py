"""GELU, SiLU, SwiGLU and GEGLU with an 8-bit saved copy: gradients, what is saved, torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coat_kernels.autograd import saved
from coat_kernels.autograd.activation import gated, geglu, gelu, silu, swiglu

#: Each function of this package on one tensor, and torch's own: gated ones split it.
PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (gelu, F.gelu),
    "gelu_tanh": (lambda x, **kw: gelu(x, "tanh", **kw), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (silu, F.silu),
    "swiglu": (lambda x, **kw: swiglu(*x.chunk(2, dim=-1), **kw), lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
    "geglu": (
        lambda x, **kw: geglu(*x.chunk(2, dim=-1), "tanh", **kw),
        lambda x: F.gelu(x.chunk(2, -1)[0], approximate="tanh") * x.chunk(2, -1)[1],
    ),
    "gated, gate first": (lambda x, **kw: gated(x, "gelu", gate_first=True, **kw), lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
    "gated, gate last": (lambda x, **kw: gated(x, "silu", gate_first=False, **kw), lambda x: F.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0]),
}
pairs = pytest.mark.parametrize("name", PAIRS)


def sample(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    y.backward(dy.to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pairs
def test_gradcheck(name: str) -> None:
    x = sample(2, 3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: PAIRS[name][0](x, fmt="none"), (x,))
    assert torch.autograd.gradcheck(PAIRS[name][0], (x,))  # float64 is never compressed


@pytest.mark.parametrize("gate_needs, up_needs", [(True, False), (False, True)])
def test_a_gradient_that_nobody_asked_for_is_none(gate_needs: bool, up_needs: bool) -> None:
    gate, up = sample(4, 32).detach().requires_grad_(gate_needs), sample(4, 32, seed=1).detach().requires_grad_(up_needs)
    swiglu(gate, up).sum().backward()
    assert (gate.grad is not None, up.grad is not None) == (gate_needs, up_needs)


@pairs
@pytest.mark.parametrize("fmt", ["none", "e4m3", "e5m2", "int8", "auto"])
def test_output_is_exact_and_the_gradient_as_good_as_its_format(name: str, fmt: str) -> None:
    """The signal-to-noise ratio of the gradient: decibels measured in activations.md 3c less a margin of 3; "none": bfloat16's."""
    ours, torchs = PAIRS[name]
    x, dy = sample(64, 512), sample(64, 256 if ours(sample(1, 32)).shape[-1] == 16 else 512, seed=1)
    y, dx = gradient(lambda x: ours(x, fmt=fmt), x, dy)
    want_y, want_dx = gradient(torchs, x.double(), dy)
    assert ((y.double() - want_y).abs() <= 2.0**-8 * want_y.abs() + 1e-5).all()
    noise = (dx.double() - want_dx).norm() / want_dx.norm()
    least = {"none": 48, "e4m3": 30, "e5m2": 24, "int8": 38, "auto": 38}[fmt]
    assert -20 * noise.log10() >= least


@pairs
def test_transformer_engines_tolerance(name: str) -> None:
    """TE's test_fusible_ops.py::test_activation[cache_quantized_input]: rtol 0.125, atol 0.0675 with e4m3."""
    ours, torchs = PAIRS[name]
    for shape in ((37,), (2, 13), (32, 1, 32)):
        x = (2 * torch.rand((*shape[:-1], 2 * shape[-1]), generator=torch.Generator().manual_seed(0)) - 1).requires_grad_()
        dy = 2 * torch.rand(torchs(x).shape, generator=torch.Generator().manual_seed(1)) - 1
        y, dx = gradient(lambda x: ours(x, fmt="e4m3"), x, dy)
        want_y, want_dx = gradient(torchs, x.double(), dy)
        torch.testing.assert_close(y.double(), want_y, rtol=0.125, atol=0.0675)
        torch.testing.assert_close(dx.double(), want_dx, rtol=0.125, atol=0.0675)


@pairs
@pytest.mark.parametrize("fmt", ["none", "auto"])
def test_compiled_equals_eager(name: str, fmt: str) -> None:
    torch._dynamo.reset()
    x, dy = sample(3, 5, 64), sample(3, 5, 64 if "gelu" in name or name == "silu" else 32, seed=1)
    run = lambda x: PAIRS[name][0](x, fmt=fmt, group_size=16)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradient(compiled, x, dy), gradient(run, x, dy), strict=True):
        assert torch.equal(got, want)


def saved_tensors(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        function(x)
    return [t for t in kept if t.numel()]


@pairs
def test_saves_codes_and_scales_and_nothing_more(name: str) -> None:
    x = sample(8, 512)
    kept = saved_tensors(lambda x: PAIRS[name][0](x, fmt="e4m3", group_size=32), x)
    assert {t.dtype for t in kept} == {torch.uint8, torch.float32}
    assert sum(t.nbytes for t in kept) == x.numel() + 4 * x.numel() // 32
    plain = saved_tensors(lambda x: PAIRS[name][0](x, fmt="none"), x)
    assert {t.untyped_storage().data_ptr() for t in plain} == {x.untyped_storage().data_ptr()}


class Formats(TorchDispatchMode):
    """Notes the `fmt` of every op of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "coat_kernels":
            self.seen += [value for value in args if value in ("none", "e4m3")]
        return func(*args, **(kwargs or {}))


@pairs
def test_no_gradient_no_codes(name: str) -> None:
    x = sample(4, 64)
    formats = {}
    for case, (operand, enabled) in {"needed": (x, True), "frozen": (x.detach(), True), "disabled": (x, False)}.items():
        with Formats() as mode, torch.set_grad_enabled(enabled):
            PAIRS[name][0](operand)
        formats[case] = mode.seen
    assert formats == {"needed": ["e4m3"], "frozen": ["none"], "disabled": ["none"]}


@pairs
def test_backward_runs_again_and_not_twice_over(name: str) -> None:
    x = sample(4, 64)
    y = PAIRS[name][0](x, fmt="int8")
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pairs
def test_output_can_be_rebuilt_from_the_codes(name: str) -> None:
    x = sample(64, 256)
    weight = torch.randn(PAIRS[name][1](x).shape[-1], 8, dtype=torch.bfloat16).requires_grad_()
    with saved.compress_saved_activations() as context:
        y = PAIRS[name][0](x, fmt="auto")
        assert saved.can_rebuild(y)
        z = y @ weight
    assert context.tally.rebuilt == 1
    z.sum().backward()
    want = y.detach().double().sum(0)
    assert weight.grad is not None
    assert -20 * ((weight.grad[:, 0].double() - want).norm() / want.norm()).log10() > 30
    with saved.compress_saved_activations(unregistered="keep"):
        assert not saved.can_rebuild(PAIRS[name][0](x, fmt="none"))


def test_errors() -> None:
    x = sample(4, 63)
    with pytest.raises(ValueError, match=r"must be even; got shape \(4, 63\)"):
        gated(x, "silu", gate_first=True)
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        gelu(x, "erf")
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        gated(sample(4, 64), "relu", gate_first=True)
    with pytest.raises(ValueError, match="fp4"):
        silu(x, fmt="fp4")
    with pytest.raises(ValueError, match="48"):
        silu(x.double(), group_size=48)
