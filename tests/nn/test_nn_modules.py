"""Norm and activation modules against torch's, diffusers' and transformers': values, gradients, class swaps, torch.compile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models import activations as diffusers_activations
from diffusers.models import normalization as diffusers_norms
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from coat_kernels.config import COATConfig
from coat_kernels.nn import FP8GELU, FP8AdaLayerNorm, FP8LayerNorm, FP8RMSNorm, FP8SiLU, FP8SwiGLU, convert_to_coat
from tests.accuracy import sqnr

D = 64
#: Outputs are not quantized: they differ by roundings, about eps a term, in sums of 64.
EXACT = {torch.float32: 120, torch.bfloat16: 44}


def randomized(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    return module.to(dtype)


def compare(plain: nn.Module, converted: nn.Module, *inputs: torch.Tensor) -> None:
    dtype = inputs[0].dtype
    results = []
    for module in (plain, converted):
        given = [x.detach().clone().requires_grad_() for x in inputs]
        module.zero_grad()
        out = module(*given)
        out = out[0] if isinstance(out, tuple) else out
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
        out.backward(dy)
        results.append((out, [x.grad for x in given] + [p.grad for p in module.parameters()]))
    (y, grads), (y8, grads8) = results
    assert y8.dtype == y.dtype
    assert sqnr(y, y8) > EXACT[dtype]
    for want, found in zip(grads, grads8, strict=True):
        assert sqnr(want, found) > 28  # of 8 bits in the derivative; a sum over rows may lose some of the 31.5 dB of e4m3
    assert any(sqnr(want, found) < 60 for want, found in zip(grads, grads8, strict=True))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LayerNorm(D),
        lambda: nn.LayerNorm(D, elementwise_affine=False),
        lambda: nn.LayerNorm(D, bias=False),
        lambda: nn.RMSNorm(D),
        lambda: nn.RMSNorm(D, eps=1e-3, elementwise_affine=False),
        lambda: diffusers_norms.RMSNorm(D, 1e-6),
        lambda: diffusers_norms.RMSNorm(D, 1e-6, bias=True),
        lambda: diffusers_norms.MochiRMSNorm(D, 1e-6),
        lambda: LlamaRMSNorm(D),
        lambda: Gemma2RMSNorm(D),
        lambda: nn.GELU(),
        lambda: nn.GELU(approximate="tanh"),
        lambda: nn.SiLU(),
        lambda: ACT2FN["gelu"],
        lambda: ACT2FN["gelu_pytorch_tanh"],
        lambda: ACT2FN["gelu_new"],
        lambda: ACT2FN["silu"],
        lambda: diffusers_activations.GELU(D, 96, approximate="tanh"),
        lambda: diffusers_activations.GEGLU(D, 96),
        lambda: diffusers_activations.SwiGLU(D, 96),
    ],
)
def test_a_converted_module_computes_what_it_did(build, dtype):
    plain = randomized(build(), dtype)
    model = nn.Sequential(copy.deepcopy(plain), nn.Linear(1, 1))
    convert_to_coat(model)
    converted = model[0]
    assert type(converted) is not type(plain)
    assert isinstance(converted, type(plain))
    assert list(converted.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 24, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    compare(plain, converted, x)
    for again in (pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)):
        assert type(again) is type(converted)
        assert again(x).equal(converted(x))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [lambda: nn.RMSNorm(D), lambda: diffusers_norms.RMSNorm(D, 1e-6), lambda: LlamaRMSNorm(D)])
def test_the_dtype_of_a_result_is_the_originals(build, weight):
    plain = randomized(build(), weight)
    converted = FP8RMSNorm.from_norm(copy.deepcopy(plain))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, D, dtype=dtype)
        assert converted(x).dtype == plain(x).dtype
        assert sqnr(plain(x), converted(x)) > EXACT[torch.bfloat16]


@pytest.mark.parametrize("kind", ["AdaLayerNormZero", "AdaLayerNormZeroSingle", "AdaLayerNormContinuous", "SD35AdaLayerNormZeroX"])
def test_modulated_norms(kind):
    if kind == "AdaLayerNormContinuous":
        plain = diffusers_norms.AdaLayerNormContinuous(D, D, elementwise_affine=False, eps=1e-6)
    else:
        plain = getattr(diffusers_norms, kind)(D)
    randomized(plain)
    converted = convert_to_coat(copy.deepcopy(plain))
    x, emb = torch.randn(2, 24, D), torch.randn(2, D)
    for want, found in zip(as_tuple(call(plain, x, emb)), as_tuple(call(converted, x, emb)), strict=True):
        assert sqnr(want, found) > EXACT[torch.float32]
    grads = []
    for module in (plain, converted):
        module.zero_grad()
        sum(out.square().sum() for out in as_tuple(call(module, x, emb))).backward()
        grads.append(module.linear.weight.grad)
    assert 28 < sqnr(*grads) < 70


def call(module, x, emb):
    return module(x, emb) if isinstance(module, diffusers_norms.AdaLayerNormContinuous) else module(x, emb=emb)


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def test_modulated_norms_with_weights_stay():
    plain = diffusers_norms.AdaLayerNormContinuous(D, D, elementwise_affine=True)
    forward = type(plain).forward
    convert_to_coat(plain)
    assert type(plain).forward is forward
    assert type(plain.norm) is FP8LayerNorm


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_direct_construction(approximate):
    x, up = torch.randn(2, 24, D), torch.randn(2, 24, D)
    config = COATConfig(activation_format="auto", activation_group_size=32)
    compare(nn.GELU(approximate), FP8GELU(approximate, config=config), x)
    compare(nn.SiLU(), FP8SiLU(config=config), x)
    compare(nn.LayerNorm(D), FP8LayerNorm(D, config=config), x)
    compare(nn.RMSNorm(D, 1e-5), FP8RMSNorm(D, 1e-5, config=config), x)
    swiglu = FP8SwiGLU()
    want = nn.functional.silu(x) * up
    assert sqnr(want, swiglu(x, up)) > 120
    assert sqnr(want, swiglu(torch.cat([x, up], -1))) > 120
    assert sqnr(want, FP8SwiGLU(gate_first=False)(torch.cat([up, x], -1))) > 120
    scale, shift = torch.randn(2, 2, D)
    want = nn.functional.layer_norm(x, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert sqnr(want, FP8AdaLayerNorm(D)(x, scale, shift)) > 120


def test_bad_arguments():
    with pytest.raises(ValueError, match="normalized_shape must have one dimension"):
        FP8LayerNorm((4, 4))
    with pytest.raises(ValueError, match="normalized_shape must have one dimension"):
        FP8RMSNorm((4, 4))
    with pytest.raises(ValueError, match="it normalizes 2 dimensions"):
        FP8LayerNorm.from_norm(nn.LayerNorm((4, 4)))
    with pytest.raises(ValueError, match="it normalizes 2 dimensions"):
        FP8RMSNorm.from_norm(nn.RMSNorm((4, 4)))
    with pytest.raises(TypeError, match="is not a known RMSNorm"):
        FP8RMSNorm.from_norm(nn.LayerNorm(4))
    with pytest.raises(TypeError, match="takes a torch.nn.LayerNorm, got"):
        FP8LayerNorm.from_norm(nn.RMSNorm(4))
    with pytest.raises(ValueError, match="FP8AdaLayerNorm normalizes a last dimension of 8, got x of shape"):
        FP8AdaLayerNorm(8)(torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4))


@pytest.mark.parametrize("module", [FP8RMSNorm(D), FP8LayerNorm(D), FP8GELU(), FP8SiLU(), FP8SwiGLU()], ids=lambda m: type(m).__name__)
def test_modules_compile_in_full(module):
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (module, compiled):
        x = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        grads.append((y, x.grad))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-6)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-5)


def test_the_modulated_norm_compiles_in_full():
    torch._dynamo.reset()
    module = FP8AdaLayerNorm(D)
    x, scale, shift = torch.randn(2, 8, D, requires_grad=True), *torch.randn(2, 2, D)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, scale, shift), module(x, scale, shift), atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("cls", [FP8LayerNorm, FP8RMSNorm])
def test_inputs_of_another_width(cls, affine):
    with pytest.raises(ValueError, match=rf"{cls.__name__} normalizes a last dimension of 64, got x of shape \(2, 63\)"):
        cls(D, elementwise_affine=affine)(torch.randn(2, 63))


def test_the_converted_norm_of_a_library_names_itself():
    norm = LlamaRMSNorm(D)
    FP8RMSNorm.from_norm(norm)
    with pytest.raises(ValueError, match=r"LlamaRMSNorm normalizes a last dimension of 64, got x of shape \(2, 63\)"):
        norm(torch.randn(2, 63))
