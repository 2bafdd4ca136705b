"""Gradients of LoRA parameters through a model whose saved activations are in 8 bits, against the same model in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel

from coat_kernels.config import COATConfig
from coat_kernels.nn import convert_to_coat
from tests.accuracy import sqnr
from tests.nn.blocks import add_lora, random_weights

#: dB of all LoRA gradients together; those of the worst parameter.
TARGETS = {"e4m3": 40.0, "auto": 46.0}
WORST = 36.0
#: 512 rows: over fewer the worst parameter, the text stream's, averages over too few tokens (35 to 37 dB at 192 rows).
IMAGE, TEXT = 192, 64


def model_and_inputs():
    torch.manual_seed(0)  # of the adapters
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 28, 28),
    )
    random_weights(model)
    with torch.no_grad():
        # channels of the residual stream that are 20 times the others, as trained transformers have
        for embedder in (model.x_embedder, model.context_embedder):
            embedder.weight[::32] *= 20
    add_lora(model)
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "hidden_states": torch.randn(2, IMAGE, 64, generator=generator),
        "encoder_hidden_states": torch.randn(2, TEXT, 128, generator=generator),
        "pooled_projections": torch.randn(2, 64, generator=generator),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.stack([torch.zeros(IMAGE), torch.arange(IMAGE) // 8, torch.arange(IMAGE) % 8], 1).float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return model, inputs, torch.randn(2, IMAGE, 64, generator=generator)


def lora_gradients(model, inputs, target):
    out = model(**inputs, return_dict=False)[0]
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = torch.autograd.grad((out - target).square().mean(), [parameter for _, parameter in named])
    return dict(zip([name for name, _ in named], found, strict=True))


@pytest.fixture(scope="module")
def reference():
    model, inputs, target = model_and_inputs()
    exact = copy.deepcopy(model).double()
    wide = {name: value.double() if name != "img_ids" and name != "txt_ids" else value for name, value in inputs.items()}
    return model, inputs, target, lora_gradients(exact, wide, target.double())


@pytest.mark.parametrize("fmt", TARGETS)
@pytest.mark.parametrize("attention", [None, "int8"])
def test_lora_gradients(reference, fmt, attention, record_property):
    model, inputs, target, exact = reference
    converted = convert_to_coat(copy.deepcopy(model), COATConfig(activation_format=fmt, attention_format=attention))
    found = lora_gradients(converted, inputs, target)
    assert found.keys() == exact.keys()
    together = sqnr(exact.values(), found.values())
    each = {name: sqnr(exact[name], found[name]) for name in exact}
    worst = min(each, key=each.__getitem__)
    record_property("sqnr", f"{fmt} attention {attention}: {together:.1f} dB, worst {worst} {each[worst]:.1f} dB")
    print(f"{fmt}, attention {attention}: {together:.1f} dB, worst {each[worst]:.1f} dB ({worst})")
    if attention is None:
        assert together >= TARGETS[fmt]
        assert each[worst] >= WORST
    assert together < 80  # 8 bits are really read


def test_a_control_is_told_apart(reference):
    """E5M2 has a bit of mantissa less."""
    model, inputs, target, exact = reference
    found = {}
    for fmt in ("e4m3", "e5m2"):
        converted = convert_to_coat(copy.deepcopy(model), COATConfig(activation_format=fmt))
        found[fmt] = sqnr(exact.values(), lora_gradients(converted, inputs, target).values())
    assert found["e5m2"] < found["e4m3"] - 3
