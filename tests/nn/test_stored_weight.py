"""FP8Linear with its frozen weight stored in FP8: products, casts, state dictionaries, writing to the weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coat_kernels import CoatWarning
from coat_kernels.autograd import linear as fp8
from coat_kernels.config import COATConfig
from coat_kernels.nn import FP8Linear
from coat_kernels.ops import fp8_gemm
from tests.accuracy import sqnr

CONFIGS = {
    granularity: COATConfig(frozen_weight_format="e4m3", frozen_weight_granularity=granularity)
    for granularity in ("per_tensor", "per_channel")
}


def stored(granularity: str = "per_tensor", dtype: torch.dtype = torch.float32, k: int = 48, n: int = 33) -> tuple[nn.Linear, FP8Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(k, n, dtype=dtype).requires_grad_(False)
    plain.weight *= torch.logspace(-3, 0, n)[:, None].to(dtype)  # channels of different size
    return plain, FP8Linear.from_linear(copy.deepcopy(plain), CONFIGS[granularity])


@pytest.mark.parametrize("granularity", CONFIGS)
def test_codes_are_within_half_a_step(granularity):
    plain, layer = stored(granularity)
    codes = layer.weight_codes
    assert codes.dtype == torch.uint8
    assert codes.shape == plain.weight.shape
    assert layer.weight_scale.shape == (() if granularity == "per_tensor" else (33, 1))
    amax = plain.weight.abs().amax(1, keepdim=True) if granularity == "per_channel" else plain.weight.abs().max()
    half = torch.maximum(plain.weight.abs() * 2**-4, amax / 448 * 2**-10) * 1.001
    assert ((layer.weight + 0) - plain.weight).abs().le(half).all()


@pytest.mark.parametrize("granularity", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(40,), (2, 20), ()], ids=str)
def test_products_are_those_of_the_decoded_weight(granularity, dtype, rows):
    _, layer = stored(granularity, dtype)
    layer.bias.requires_grad_()
    weight = layer.weight.clone()
    x = torch.randn(*rows, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for product in (layer, lambda x: F.linear(x, weight, layer.bias)):
        x = x.detach().requires_grad_()
        layer.bias.grad = None
        y = product(x)
        y.float().square().sum().backward()
        results.append((y, x.grad, layer.bias.grad))
    for found, want in zip(*results, strict=True):
        assert torch.allclose(found, want, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("granularity", CONFIGS)
@pytest.mark.parametrize("rows", ["per_tensor", "per_row"])
def test_fp8_products(granularity, rows, monkeypatch):
    """A scale for each output channel lies on the contracted dimension of the data gradient: it goes into dy, where it is exact."""
    monkeypatch.setattr(fp8_gemm, "gemm_mode", lambda device: "fp8")
    plain, layer = stored(granularity)
    layer.coat_config = COATConfig(activation_linear_granularity=rows)
    x = torch.randn(64, 48, requires_grad=True)
    y, dy = layer(x), torch.randn(64, 33)
    y.backward(dy)
    assert sqnr(plain(x), y) > 25  # two operands in e4m3, 31.5 dB each
    assert sqnr(dy @ plain.weight, x.grad) > 22  # dy in e5m2: 25.5 dB
    assert sqnr(dy @ plain.weight, x.grad) < 60


def test_nothing_but_the_codes_is_kept():
    _, layer = stored("per_channel")
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(8, 48, requires_grad=True))
    assert {t.data_ptr() for t in kept} == {layer.weight_codes.data_ptr(), layer.weight_scale.data_ptr()}
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(8, 48)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double().float(), lambda m: m.type(torch.float16)]
)
def test_casts_of_the_module_leave_codes_and_scale_alone(cast):
    _, layer = stored("per_channel")
    model = nn.Sequential(copy.deepcopy(layer))
    cast(model)
    assert model[0].weight_codes.equal(layer.weight_codes)
    assert model[0].weight_scale.equal(layer.weight_scale)
    assert model[0].weight.dtype == model[0].bias.dtype
    assert model[0](torch.randn(2, 48, dtype=model[0].bias.dtype)).isfinite().all()


def test_moves_take_codes_and_scale_along():
    _, layer = stored()
    layer.to("meta")
    assert layer.weight_codes.is_meta
    assert layer.weight_scale.is_meta
    assert layer.weight.device.type == "meta"


@pytest.mark.parametrize("granularity", CONFIGS)
def test_state_dictionaries_load_in_every_direction(granularity, tmp_path):
    plain, layer = stored(granularity, torch.bfloat16)
    state = layer.state_dict()
    assert state["weight"].dtype == torch.float8_e4m3fn
    assert set(state) == {"weight", "weight_scale", "bias"}
    torch.save(state, tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True)

    into_stored = stored(granularity)[1]
    into_stored.weight_codes.zero_()
    into_stored.load_state_dict(state)
    assert into_stored.weight_codes.equal(layer.weight_codes)
    assert into_stored.weight_scale.equal(layer.weight_scale)

    into_plain = FP8Linear(48, 33, dtype=torch.bfloat16)
    into_plain.load_state_dict(state)
    assert into_plain.weight.equal(layer.weight + 0)

    from_plain = stored(granularity)[1]
    from_plain.weight_codes.zero_()
    from_plain.load_state_dict(plain.state_dict())  # a checkpoint in bfloat16 is quantized
    assert from_plain.weight_codes.equal(layer.weight_codes)

    nested = nn.ModuleDict({"a": stored(granularity)[1], "b": nn.Linear(3, 3)})
    again = copy.deepcopy(nested)
    again.load_state_dict(nested.state_dict())


def test_state_dictionaries_that_do_not_fit():
    _, layer = stored()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight\""):
        layer.load_state_dict({"bias": layer.bias})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: the dictionary has \(3, 3\), the layer \(33, 48\)"):
        layer.load_state_dict({"bias": layer.bias, "weight": torch.ones(3, 3)})
    with pytest.raises(RuntimeError, match="weight_scale"):  # torch's own layer does not take raw codes for values
        nn.Linear(48, 33).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("target", ["stored", "plain"])
def test_values_beside_a_scale_are_refused(target):
    """sd-scripts merges into the dictionary: `float()` of codes are no values, and the scale stays behind."""
    _, source = stored()
    layer = stored()[1] if target == "stored" else FP8Linear(48, 33)
    before = layer.weight.clone()
    state = source.state_dict()
    state["weight"] = state["weight"].float() + 0.01
    with pytest.raises(
        RuntimeError, match=r"weight is torch.float32 beside a weight_scale.*layer.weight.data = layer.weight.data \+ delta"
    ):
        layer.load_state_dict(state)
    assert layer.weight.equal(before)
    with pytest.raises(RuntimeError, match=r"weight is torch.float8_e5m2 beside a weight_scale"):
        layer.load_state_dict(source.state_dict() | {"weight": torch.zeros(33, 48, dtype=torch.float8_e5m2)})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_scale: the dictionary has \(48, 1\), needed is \(\) or \(33, 1\)"):
        layer.load_state_dict(source.state_dict() | {"weight_scale": torch.ones(48, 1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: the dictionary has \(48, 33\)"):
        layer.load_state_dict(source.state_dict() | {"weight": torch.zeros(48, 33, dtype=torch.uint8)})
    layer.load_state_dict(source.state_dict() | {"weight": source.weight_codes})  # raw bytes, as safetensors may hold them
    assert layer.weight.equal(source.weight + 0)


def test_codes_without_their_scale_are_refused():
    _, layer = stored()
    with pytest.raises(RuntimeError, match="weight is torch.uint8 without a weight_scale"):
        layer.load_state_dict({"bias": layer.bias, "weight": layer.weight_codes})
    values = layer.decoded_weight().to(torch.float8_e4m3fn)  # checkpoints cast to float8 hold values
    layer.load_state_dict({"bias": layer.bias, "weight": values})
    assert sqnr(values.float(), layer.weight + 0) > 25


@pytest.mark.parametrize("granularity", CONFIGS)
@pytest.mark.parametrize("plain", [False, True], ids=["codes", "values"])
def test_layers_made_on_meta(granularity, plain):
    def empty() -> FP8Linear:
        with torch.device("meta"):
            return FP8Linear.from_linear(nn.Linear(48, 33).requires_grad_(False), CONFIGS[granularity])

    source, layer = stored(granularity)
    state = (source if plain else layer).state_dict()
    assigned = empty()
    assigned.load_state_dict(state, assign=True)
    copied = empty().to_empty(device="cpu")
    copied.load_state_dict(state)
    x = torch.randn(4, 48)
    for again in (assigned, copied):
        assert again.weight_codes.equal(layer.weight_codes)
        assert again.weight_scale.equal(layer.weight_scale)
        assert again(x).equal(layer(x))


def test_copies_and_pickles():
    _, layer = stored()
    x = torch.randn(4, 48)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is type(layer)
        assert again(x).equal(layer(x))
        assert "weight=e4m3 per_tensor" in repr(again)


def test_the_weight_reads_like_a_tensor():
    plain, layer = stored(dtype=torch.bfloat16)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == (plain.weight.shape, torch.bfloat16, plain.weight.device)
    assert not weight.requires_grad
    values = fp8.decode((layer.weight_codes, layer.weight_scale), torch.bfloat16)
    assert type(weight + 0) is torch.Tensor
    assert weight.data.equal(values)
    assert weight.norm().equal(values.norm())
    assert torch.empty_like(values).copy_(weight).equal(values)
    assert "decoded" in repr(weight)
    assert "weight" not in dict(layer.named_parameters())
    assert type(layer).__name__ == "Linear"
    assert layer.store_weight() is None


def test_changes_in_place_are_refused():
    _, layer = stored()
    with torch.no_grad():
        for change in (lambda w: w.add_(1), lambda w: w.copy_(torch.zeros(33, 48)), lambda w: w.__setitem__(0, 1.0)):
            with pytest.raises(RuntimeError, match="would change a weight that is stored in FP8"):
                change(layer.weight)
    with pytest.raises(RuntimeError, match="stored in FP8 cannot be trained"):
        layer.weight.requires_grad_()


@pytest.mark.parametrize("read", [lambda w: w.data, lambda w: w.detach(), lambda w: w.data[3], lambda w: w.data.t().chunk(2)[0]])
def test_writing_to_decoded_values_is_refused(read):
    """They are made anew at each reading: what is written to them would be lost."""
    _, layer = stored()
    values = read(layer.weight)
    changes = (
        lambda w: w.copy_(torch.ones_like(w)),
        lambda w: w.mul_(0),
        lambda w: w.add_(1),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: torch.add(w, 1, out=w),
        lambda w: nn.init.zeros_(w),
        lambda w: nn.init.normal_(w),
        lambda w: F.relu(w, inplace=True),
        lambda w: torch._foreach_add_([w], 1.0),
    )
    for change in changes:
        with pytest.raises(RuntimeError, match="would change a weight that is stored in FP8"):
            change(values)


def test_decoded_values_read_like_a_tensor(tmp_path):
    _, layer = stored()
    values, want = layer.weight.data, layer.decoded_weight()
    assert values.equal(want)
    assert (values.numpy() == want.numpy()).all()
    assert type(values.view(-1)) is type(values)
    for copied in (values.clone(), values * 1, values.half(), copy.deepcopy(values), pickle.loads(pickle.dumps(values)), want + values):
        assert type(copied) is torch.Tensor
        copied.add_(1)
    torch.save(values, tmp_path / "weight.pt")
    assert torch.load(tmp_path / "weight.pt", weights_only=True).equal(want)
    total = torch.zeros_like(want)
    total += values
    total.copy_(values)
    assert type(total) is torch.Tensor
    assert layer.weight.data.equal(want)
    with pytest.warns(CoatWarning, match="FP8 would round"):
        layer.weight.data = layer.weight.data
    assert type(layer.weight.data) is torch.Tensor
    layer.weight.data.zero_()


def test_data_can_be_added_to():
    """As PEFT merges: Python assigns the sum."""
    _, layer = stored()
    want, delta = layer.decoded_weight() + 0.5, torch.full((33, 48), 0.5)
    with pytest.warns(CoatWarning, match="FP8 would round"):
        layer.weight.data += delta
    assert layer.weight.equal(want)
    layer.weight.data -= delta
    assert torch.allclose(layer.weight, want - 0.5)


@pytest.mark.parametrize("write", ["data", "attribute", "parameter"])
def test_an_assigned_weight_is_kept_as_it_is(write):
    _, layer = stored()
    new = torch.randn(33, 48)
    with pytest.warns(CoatWarning, match="FP8 would round most of a merged adapter away"):
        if write == "data":
            layer.weight.data = new
        elif write == "attribute":
            layer.weight = new
        else:
            layer.weight = nn.Parameter(new, requires_grad=False)
    assert type(layer) is FP8Linear
    assert layer.weight.equal(new)
    assert not layer.weight.requires_grad
    assert not hasattr(layer, "weight_codes")
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_trained_and_empty_weights_are_not_stored():
    config = CONFIGS["per_tensor"]
    trained = FP8Linear.from_linear(nn.Linear(4, 4), config)
    assert type(trained.weight) is nn.Parameter
    with pytest.raises(RuntimeError, match="a weight that is trained cannot be stored in FP8"):
        trained.store_weight()
    assert type(FP8Linear.from_linear(nn.Linear(0, 4).requires_grad_(False), config).weight) is nn.Parameter


def test_compiles_in_full():
    _, layer = stored("per_channel")
    torch._dynamo.reset()
    x = torch.randn(8, 48, requires_grad=True)
    assert torch.compile(layer, fullgraph=True, backend="aot_eager")(x).equal(layer(x))
