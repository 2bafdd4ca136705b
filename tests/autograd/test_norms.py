"""`norm`, `norm_rope` and `gated_residual` under autograd: gradcheck, what is saved, compilation, and the rest of autograd's rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coat_kernels.autograd.gated_residual import gated_residual
from coat_kernels.autograd.norm import layer_norm, layer_norm_modulate, norm, rms_norm
from coat_kernels.autograd.norm_rope import norm_rope
from coat_kernels.autograd.saved import can_rebuild, compress_saved_activations
from tests.rounding import sqnr

EXACT = {"fmt": "none", "group_size": 16}


def draw(*shape: int, dtype: torch.dtype = torch.float64, trained: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(trained)


def tables(tokens: int, head_dim: int, dtype: torch.dtype, interleaved: bool = True) -> tuple[Tensor, Tensor]:
    angle = draw(tokens, head_dim // 2, dtype=dtype, trained=False)
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


#: Function of trained tensors, and their shapes.
CHECKED: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "rms": (lambda x, w: rms_norm(x, w, **EXACT), ((4, 3, 9), (9,))),
    "rms-frozen": (lambda x: rms_norm(x, torch.full((9,), 0.7).double(), **EXACT), ((4, 3, 9),)),
    "rms-no-weight": (lambda x: rms_norm(x, **EXACT), ((4, 3, 9),)),
    "rms-heads": (lambda x, w: rms_norm(x, w, **EXACT), ((2, 3, 2, 8), (8,))),
    "gemma": (lambda x, w: rms_norm(x, w, plus_one=True, **EXACT), ((4, 9), (9,))),
    "layer": (lambda x, w, b: layer_norm(x, w, b, **EXACT), ((4, 3, 9), (9,), (9,))),
    "layer-none": (lambda x: layer_norm(x, **EXACT), ((4, 3, 9),)),
    "layer-weight": (lambda w, b: layer_norm(draw(4, 9, trained=False), w, b, **EXACT), ((9,), (9,))),
    "modulate": (lambda x, s, t: layer_norm_modulate(x, s, t, **EXACT), ((2, 3, 9), (2, 9), (2, 9))),
    "modulate-tokens": (lambda x, s, t: layer_norm_modulate(x, s, t, **EXACT), ((2, 3, 9), (2, 3, 9), (2, 3, 9))),
    "modulate-one": (lambda x, s, t: layer_norm_modulate(x, s, t, **EXACT), ((2, 3, 9), (2, 1, 9), (2, 1, 9))),
    "rope": (lambda x, w: norm_rope(x, 2 + w, *tables(3, 6, torch.float64)), ((2, 3, 2, 6), (6,))),
    "rope-two": (
        lambda x, w, v: norm_rope(x, 2 + w, *tables(3, 6, torch.float64), first_weight=v.exp(), first_tokens=2),
        ((2, 3, 2, 6), (6,), (6,)),
    ),
    "rope-halves": (
        lambda x: norm_rope(x, torch.ones(6).double(), *tables(3, 6, torch.float64, False), interleaved=False),
        ((1, 3, 2, 6),),
    ),
    "rope-none": (lambda x, w: norm_rope(x, 2 + w.sin(), None, None), ((2, 3, 2, 5), (5,))),
    "gated": (lambda r, x, g: gated_residual(r, x, g, **EXACT), ((2, 3, 9), (2, 3, 9), (2, 1, 9))),
    "gated-frozen": (lambda r, x: gated_residual(r, x, torch.ones(9).double(), **EXACT), ((2, 3, 9), (2, 3, 9))),
}


@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(name: str) -> None:
    function, shapes = CHECKED[name]
    assert torch.autograd.gradcheck(function, [draw(*shape, seed=i) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_functions_of_torch(dtype: torch.dtype) -> None:
    """Values and gradients; in bfloat16 both round at the end, by 2^-8 at most, the codes by 2^-4 of xhat."""
    x, weight, bias = (draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((2, 5, 256), (256,), (256,))))
    scale, shift = draw(2, 256, dtype=dtype), draw(2, 256, dtype=dtype, seed=5)
    normed = F.layer_norm(x, (256,), eps=1e-6)
    pairs = [
        (rms_norm(x, weight), F.rms_norm(x, (256,), weight, 1e-6), (x, weight)),
        (layer_norm(x, weight, bias), F.layer_norm(x, (256,), weight, bias), (x, weight, bias)),
        (layer_norm_modulate(x, scale, shift), normed * (1 + scale[:, None]) + shift[:, None], (x, scale, shift)),
        (gated_residual(x, normed.detach(), scale), x + scale[:, None] * normed.detach(), (x, scale)),
    ]
    for got, want, tensors in pairs:
        assert got.dtype == want.dtype
        assert sqnr(got, want) > (45 if dtype == torch.bfloat16 else 110)
        dy = torch.randn_like(got)
        grads = torch.autograd.grad(got, tensors, dy)
        for grad, wanted, tensor in zip(grads, torch.autograd.grad(want, tensors, dy), tensors, strict=True):
            assert grad.shape == tensor.shape and grad.dtype == tensor.dtype
            assert sqnr(grad, wanted) > 28


def saved_by(run: Callable[[], Tensor]) -> dict[tuple[torch.dtype, tuple[int, ...]], int]:
    """The tensors that a call saves, by dtype and shape."""
    found: dict[tuple[torch.dtype, tuple[int, ...]], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.dtype, tuple(tensor.shape)
        found[key] = found.get(key, 0) + 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return found


def test_only_codes_and_statistics_are_saved() -> None:
    x, weight = draw(2, 5, 256, dtype=torch.bfloat16), draw(256, dtype=torch.bfloat16)
    codes = {(torch.uint8, (2, 5, 256)): 1, (torch.float32, (2, 5, 2)): 1}
    norms = {**codes, (torch.float32, (10,)): 1}
    parameter = {(torch.bfloat16, (256,)): 1}
    assert saved_by(lambda: rms_norm(x, weight)) == {**norms, **parameter}
    assert saved_by(lambda: layer_norm(x)) == norms
    residual = draw(2, 5, 256, dtype=torch.bfloat16, seed=1)
    assert saved_by(lambda: gated_residual(residual, x, weight)) == {**codes, **parameter}
    bare = {(torch.uint8, (0,)): 1, (torch.float32, (0,)): 1}
    assert saved_by(lambda: gated_residual(residual, x, weight.detach())) == {**bare, **parameter}
    heads = draw(2, 5, 2, 128, dtype=torch.bfloat16)
    rope = tables(5, 128, torch.float32)
    kept = saved_by(lambda: norm_rope(heads, weight[:128], *rope))
    assert kept == {
        (torch.bfloat16, (2, 5, 2, 128)): 1,
        (torch.float32, (2, 5, 2)): 1,
        (torch.bfloat16, (128,)): 1,
        (torch.float32, (5, 128)): 2,
    }


def test_attention_and_norm_rope_share_one_storage() -> None:
    heads, weight = draw(1, 5, 2, 128, dtype=torch.bfloat16), torch.ones(128)
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == heads.numel():
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        q, k = (norm_rope(heads * factor, weight, *tables(5, 128, torch.float32)) for factor in (1, 2))
        value = heads.detach()
        F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, value)))
    assert {q.data_ptr(), k.data_ptr()} <= kept
    assert len(kept) <= 4  # q, k, v and the output


def test_the_output_is_rebuilt_where_another_layer_would_save_it() -> None:
    x, scale = draw(2, 64, 256, dtype=torch.float32), draw(2, 256, dtype=torch.float32)
    weight = draw(8, 256, dtype=torch.float32)
    with compress_saved_activations():
        y = layer_norm_modulate(x, scale, scale, fmt="auto")
        assert can_rebuild(y)
        out = y @ weight.t()
    grad = torch.autograd.grad(out.square().sum(), weight)[0]
    plain = layer_norm_modulate(x, scale, scale) @ weight.t()
    exact = torch.autograd.grad(plain.square().sum(), weight)[0]
    assert 30 < sqnr(grad, exact) < 80  # from 8 bits, and not from y itself


@pytest.mark.parametrize("needs", range(1, 8))
def test_only_what_is_needed_gets_a_gradient(needs: int) -> None:
    tensors = [draw(2, 4, 16, dtype=torch.float32), draw(2, 1, 16, dtype=torch.float32), draw(2, 1, 16, dtype=torch.float32, seed=1)]
    whole = torch.autograd.grad(layer_norm_modulate(*tensors, group_size=16).square().sum(), tensors)
    chosen = [tensor.detach().requires_grad_(bool(needs >> i & 1)) for i, tensor in enumerate(tensors)]
    layer_norm_modulate(*chosen, group_size=16).square().sum().backward()
    for tensor, want in zip(chosen, whole, strict=True):
        assert tensor.grad is None if not tensor.requires_grad else torch.equal(tensor.grad, want)


def test_nothing_is_encoded_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    import coat_kernels.ops.row_values as row_values

    monkeypatch.setattr(row_values, "encode", lambda *_: pytest.fail("encoded for nobody"))
    x, weight = draw(2, 16), draw(16)  # float64: the reference
    with torch.no_grad():
        y = rms_norm(x, weight)
    assert not y.requires_grad
    assert torch.equal(y, rms_norm(x.detach(), weight.detach()))
    gated_residual(x.detach(), x.detach(), weight.detach())


ROPE = tables(5, 8, torch.float32)
MODULES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "rms": (lambda x, w: rms_norm(x, w, group_size=16), ((2, 5, 48), (48,))),
    "modulate": (lambda x, s, t: layer_norm_modulate(x, s, t, group_size=16, fmt="auto"), ((2, 5, 48), (2, 48), (2, 1, 48))),
    "rope": (
        lambda x, w, v: norm_rope(x, 2 + w, *ROPE, first_weight=v.exp(), first_tokens=2),
        ((2, 5, 3, 8), (8,), (8,)),
    ),
    "gated": (lambda r, x, g: gated_residual(r, x, g, group_size=16), ((2, 5, 48), (2, 5, 48), (2, 1, 48))),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiles_to_one_graph(name: str) -> None:
    function, shapes = MODULES[name]
    tensors = [draw(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    got, want = compiled(*tensors), function(*tensors)
    assert torch.equal(got, want)
    weights = torch.randn_like(want)
    grads = torch.autograd.grad((got * weights).sum(), tensors)
    for grad, wanted in zip(grads, torch.autograd.grad((want * weights).sum(), tensors), strict=True):
        assert torch.equal(grad, wanted)


def test_a_compiled_norm_takes_other_batches() -> None:
    compiled = torch.compile(lambda x, s: layer_norm_modulate(x, s, s, group_size=16), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        x, scale = draw(batch, 4, 32, dtype=torch.float32), draw(batch, 32, dtype=torch.float32)
        want = layer_norm_modulate(x, scale, scale, group_size=16)
        got = compiled(x, scale)
        assert torch.equal(got, want)
        for grad, wanted in zip(*(torch.autograd.grad(y.square().sum(), (x, scale)) for y in (got, want)), strict=True):
            assert torch.equal(grad, wanted)


@pytest.mark.parametrize("name", MODULES)
def test_graphs_can_be_walked_twice_and_not_differentiated_twice(name: str) -> None:
    function, shapes = MODULES[name]
    tensors = [draw(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]
    loss = function(*tensors).square().sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, tensors, retain_graph=True), strict=True):
        assert torch.equal(a, b)
    twice = torch.autograd.grad(loss, tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative|not have been used"):
        torch.autograd.grad(sum(grad.square().sum() for grad in twice), tensors)


def test_autocast_leaves_the_dtype_to_x() -> None:
    x, weight = draw(3, 32, dtype=torch.bfloat16), draw(32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(x, weight)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_errors() -> None:
    x = torch.ones(2, 3, 8)
    with pytest.raises(ValueError, match=r"gain of shape \(3, 8\) does not broadcast over x of shape \(2, 3, 8\): pass \[D\]"):
        norm(x, torch.ones(3, 8), center=True)
    with pytest.raises(ValueError, match=r"gate of shape \(2, 4, 8\) does not broadcast"):
        gated_residual(x, x, torch.ones(2, 4, 8))
