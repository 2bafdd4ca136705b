"""FP8Linear against nn.Linear: exact results where nothing is multiplied in FP8, derived bounds for what reads 8 bits, what is kept."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coat_kernels.autograd import linear as fp8
from coat_kernels.autograd import shared
from coat_kernels.config import COATConfig
from coat_kernels.nn import FP8GELU, FP8Linear, compress_saved_activations
from coat_kernels.ops import fp8_gemm
from tests.accuracy import sqnr

SHAPES = [(16, 16), (2, 16, 16), (3, 2, 16, 16)]  # of torchao's tests
PER_ROW = COATConfig(activation_linear_granularity="per_row")


@pytest.fixture(params=["storage", "fp8"])
def mode(request, monkeypatch):
    """With "fp8" the code that multiplies on tensor cores, which runs on CPUs, too, through the same function of torch."""
    monkeypatch.setattr(fp8_gemm, "gemm_mode", lambda device: request.param)
    monkeypatch.setattr(fp8, "MIN_FP8_ROWS", 1)
    return request.param


def pair(k: int, n: int, config: COATConfig | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, FP8Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(k, n, dtype=dtype)
    return plain, FP8Linear.from_linear(copy.deepcopy(plain), config)


def run(layer: nn.Module, x: torch.Tensor, dy_seed: int = 3) -> tuple[torch.Tensor, ...]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(dy_seed)).to(y.dtype)
    layer.zero_grad()
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", [None, PER_ROW], ids=["per_tensor", "per_row"])
def test_torchao_tolerances(mode, shape, config):
    """pytorch/ao, test/float8/test_base.py: y at least 18 dB, dW at least 17 dB; the bias is exact."""
    plain, layer = pair(shape[-1], 32, config)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (y, dx, dw, db), (y8, dx8, dw8, db8) = run(plain, x), run(layer, x)
    assert sqnr(y, y8) >= 18
    assert sqnr(dx, dx8) >= 18
    assert sqnr(dw, dw8) >= 17
    assert torch.allclose(db, db8, rtol=1e-6)
    assert mode == "storage" or sqnr(y, y8) < 60  # the product did read 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(1,), (0,), (3, 7), ()], ids=str)
@pytest.mark.parametrize("config", [None, PER_ROW], ids=["per_tensor", "per_row"])
def test_storage_is_exact_but_for_the_saved_input(dtype, rows, config):
    plain, layer = pair(17, 33, config, dtype)
    x = torch.randn(*rows, 17, generator=torch.Generator().manual_seed(1)).to(dtype)
    (y, dx, dw, db), (y8, dx8, dw8, db8) = run(plain, x), run(layer, x)
    assert y.equal(y8)
    tight = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}  # sums in another order
    assert torch.allclose(dx, dx8, **tight)
    assert torch.allclose(db, db8, **tight)
    # e4m3: half a step is 2^-4 of the value, or half of the least step, 2^-10 of what 1 stands for; then sums in the dtype
    flat = x.reshape(-1, 17).double()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype).reshape(-1, 33).double()
    if flat.numel():
        amax = flat.abs().amax(-1, keepdim=True) if config is PER_ROW else flat.abs().max()
        error = torch.maximum(flat.abs() * 2**-4, amax / 448 * 2**-10)
        bound = dy.abs().T @ (error * 1.01 + flat.abs() * 4 * torch.finfo(dtype).eps)
        assert ((dw8.double() - dy.T @ flat).abs() <= bound + 1e-12).all()
        assert not dw8.equal(dw)
    else:
        assert not dw8.any()


def saved_tensors(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    return kept


def test_what_a_trained_layer_keeps(mode):
    _, layer = pair(64, 32)
    kept = saved_tensors(layer, torch.randn(8, 64, requires_grad=True))
    assert sorted((tuple(t.shape), t.dtype) for t in kept) == [((), torch.float32), ((8, 64), torch.uint8), ((32, 64), torch.float32)]
    assert any(t is layer.weight for t in kept)


def test_a_frozen_layer_keeps_nothing_but_its_weight(mode):
    _, layer = pair(64, 32)
    layer.weight.requires_grad_(False)
    kept = saved_tensors(layer, torch.randn(8, 64, requires_grad=True))
    assert [t.untyped_storage().data_ptr() for t in kept] == [layer.weight.untyped_storage().data_ptr()]


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_keeps_no_copy_of_the_weight(mode, frozen):
    plain, layer = pair(64, 32)
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_tensors(layer, x.requires_grad_())
        assert not [t for t in kept if t.shape == (32, 64) and t.dtype != torch.float32]
        y, y8 = plain(x), layer(x)
    assert y8.dtype == torch.bfloat16
    assert sqnr(y, y8) > (25 if mode == "fp8" else 1000)
    y8.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert frozen or layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_share_one_copy_of_their_input(autocast):
    _, q = pair(64, 32)
    k = copy.deepcopy(q)
    x = torch.randn(8, 64, requires_grad=True) * 1
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        codes = [t for layer in (q, k) for t in saved_tensors(layer, x) if t.dtype == torch.uint8]
    assert codes[0].data_ptr() == codes[1].data_ptr()
    x += 1  # a new version is a new tensor
    third = next(t for t in saved_tensors(q, x) if t.dtype == torch.uint8)
    assert third.data_ptr() != codes[0].data_ptr()
    assert not third.equal(codes[0])


def test_shared_copies_go_with_their_tensor():
    gc.collect()
    before = len(shared._CODES)
    x = torch.randn(8, 64, requires_grad=True) * 1
    _, layer = pair(64, 32)
    layer(x)
    assert len(shared._CODES) == before + 1
    del x
    gc.collect()
    assert len(shared._CODES) == before


def test_an_input_that_can_be_rebuilt_is_not_saved():
    _, layer = pair(64, 32)
    act = FP8GELU()
    x = torch.randn(128, 64, requires_grad=True)
    context = compress_saved_activations()
    with context:
        y = layer(act(x))
    assert context.tally.rebuilt == 1
    assert context.tally.packed == 0
    y.square().sum().backward()
    x2, w2 = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    F.linear(F.gelu(x2), w2, layer.bias.detach()).square().sum().backward()
    assert 25 < sqnr(w2.grad, layer.weight.grad) < 60
    assert 25 < sqnr(x2.grad, x.grad) < 60


@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
def test_gradcheck_in_float64(frozen):
    _, layer = pair(5, 3, dtype=torch.float64)
    if frozen:
        getattr(layer, frozen).requires_grad_(False)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    weight.requires_grad_(frozen != "weight")
    bias.requires_grad_(frozen != "bias")
    torch.autograd.gradcheck(lambda x, w, b: fp8.linear(x, w, b), (x, weight, bias))


def test_retained_graphs_and_accumulation(mode):
    _, layer = pair(64, 32)
    x = torch.randn(40, 64, requires_grad=True)
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    once, dx = layer.weight.grad.clone(), x.grad.clone()
    loss.backward()
    assert torch.allclose(layer.weight.grad, 2 * once)
    assert torch.allclose(x.grad, 2 * dx)


def test_second_derivatives_are_refused():
    _, layer = pair(64, 32)
    x = torch.randn(40, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_nan_reaches_its_own_column_only():
    _, layer = pair(64, 32)
    x = torch.randn(40, 64)
    x[3, 5] = torch.nan
    layer(x)[torch.arange(40) != 3].sum().backward()
    bad = layer.weight.grad.isnan()
    assert bad[:, 5].all()
    bad[:, 5] = False
    assert not bad.any()


def test_a_dtype_that_does_not_match_is_torchs_own_error(mode):
    plain, layer = pair(64, 32)
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as expected:
        plain(x)
    with pytest.raises(RuntimeError) as found:
        layer(x)
    assert str(found.value) == str(expected.value)


def test_few_rows_are_not_multiplied_in_fp8(monkeypatch):
    monkeypatch.setattr(fp8_gemm, "gemm_mode", lambda device: "fp8")
    plain, layer = pair(64, 32)
    x = torch.randn(fp8.MIN_FP8_ROWS - 1, 64)
    assert layer(x).equal(plain(x))
    assert not layer(torch.cat([x, x])).equal(plain(torch.cat([x, x])))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_compiles_in_full(mode, frozen, autocast):
    _, layer = pair(48, 32)
    layer.weight.requires_grad_(not frozen)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 48)
    (y, dx), (y_compiled, dx_compiled) = (forward_and_dx(each, x, autocast) for each in (layer, compiled))
    assert y.equal(y_compiled)
    assert dx.equal(dx_compiled)
    assert frozen or layer.weight.grad.equal(compiled.weight.grad)


def forward_and_dx(layer, x, autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().sum().backward()
    return y.detach(), x.grad


def test_the_class_swap_keeps_what_trainers_look_at():
    plain = nn.Linear(8, 4)
    weight, state = plain.weight, plain.state_dict()
    layer = FP8Linear.from_linear(plain)
    assert layer is plain
    assert layer.weight is weight
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "Linear"  # sd-scripts and ai-toolkit match by name
    assert list(layer.state_dict()) == list(state)
    assert "fp8=per_tensor" in repr(layer)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(again) is FP8Linear
        assert again.weight.equal(weight)
        assert again.coat_config == layer.coat_config
    assert type(FP8Linear(8, 4, bias=False, dtype=torch.bfloat16)) is FP8Linear


def test_only_plain_linears_are_swapped():
    class Odd(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"from_linear takes a torch.nn.Linear, got .*Odd"):
        FP8Linear.from_linear(Odd(2, 2))
    with pytest.raises(TypeError, match="FP8Linear"):
        FP8Linear.from_linear(FP8Linear(2, 2))


def test_products_can_stay_in_the_models_dtype(monkeypatch):
    monkeypatch.setattr(fp8_gemm, "gemm_mode", lambda device: "fp8")
    x = torch.randn(64, 48)
    for stored in (None, "e4m3"):
        plain = nn.Linear(48, 32).requires_grad_(stored is None)
        exact = nn.Linear(48, 32)
        exact.load_state_dict(plain.state_dict())
        layer = FP8Linear.from_linear(plain, COATConfig(use_fp8_products=False, frozen_weight_format=stored))
        weight = layer.weight.detach() if stored else exact.weight
        assert torch.equal(layer(x), F.linear(x, weight, exact.bias))
        layer.coat_config = COATConfig(frozen_weight_format=stored)
        assert not torch.equal(layer(x), F.linear(x, weight, exact.bias))
