"""LoRA of the real PEFT, put on before and after a conversion; merged, unmerged, saved; adapters that trainers of diffusion models make."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from coat_kernels import CoatWarning
from coat_kernels.config import COATConfig
from coat_kernels.nn import FP8Linear, conversion_report, convert_to_coat, replace_linear_with_fp8
from tests.accuracy import sqnr
from tests.nn.models import CASES

CASE = CASES["llama"]
STORED = COATConfig(frozen_weight_format="e4m3", frozen_weight_granularity="per_channel")


def with_lora(model: nn.Module, **options) -> nn.Module:
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"], "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(**settings | options))
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def plain():
    model = with_lora(CASE.build())
    return model, *CASE.gradients(model)


@pytest.mark.parametrize("order", ["before", "after"])
def test_order_does_not_matter(plain, order):
    if order == "before":
        model = with_lora(convert_to_coat(CASE.build()))
    else:
        model = convert_to_coat(with_lora(CASE.build()))
        adapters = [row for row in conversion_report(model).left if row.outcome.startswith("an adapter")]
        assert len(adapters) == 2 * 2 * 4
    _, y, grads = plain
    y8, grads8 = CASE.gradients(model)
    assert grads8.keys() == grads.keys()
    assert all("lora_" in name for name in grads8)
    assert sqnr(y, y8) > 110
    assert 30 < sqnr(grads.values(), grads8.values()) < 70
    assert all(type(m) is nn.Linear for n, m in model.named_modules() if n.endswith(("lora_A.default", "lora_B.default")))
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer, FP8Linear)
    saved = get_peft_model_state_dict(model)
    assert saved.keys() == get_peft_model_state_dict(plain[0]).keys()


def test_a_conversion_inside_of_peft_is_said_and_not_doubled():
    model = with_lora(convert_to_coat(CASE.build()))
    with pytest.warns(CoatWarning, match="converted already"):
        convert_to_coat(model)


def test_merge_and_unmerge(plain):
    model = with_lora(convert_to_coat(CASE.build()))
    y = plain[1]
    model.merge_adapter()
    assert sqnr(y, CASE.output(model(**CASE.inputs()))) > 100
    model.unmerge_adapter()
    assert sqnr(y, CASE.output(model(**CASE.inputs()))) > 100
    merged = model.merge_and_unload()
    assert sqnr(y, CASE.output(merged(**CASE.inputs()))) > 100


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_weights_stored_in_fp8(plain, safe):
    base = CASE.build().requires_grad_(False)
    model = with_lora(convert_to_coat(base, STORED))
    assert "weight_codes" in vars(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer)
    y = CASE.output(model(**CASE.inputs()))
    assert 20 < sqnr(plain[1], y) < 60  # weights of 31.5 dB
    with pytest.warns(CoatWarning, match="FP8 would round most of a merged adapter away"):
        model.merge_adapter(safe_merge=safe)
    assert sqnr(y, CASE.output(model(**CASE.inputs()))) > 100  # merged exactly
    model.unmerge_adapter()
    assert sqnr(y, CASE.output(model(**CASE.inputs()))) > 100
    layers = model.base_model.model.model.layers[0].self_attn
    assert type(layers.q_proj.base_layer) is FP8Linear
    assert "weight_codes" in vars(layers.k_proj)  # without an adapter: still stored


def test_gradients_through_stored_weights(plain):
    model = with_lora(replace_linear_with_fp8(CASE.build().requires_grad_(False), STORED))
    reference = copy.deepcopy(plain[0])
    for name, module in model.named_modules():
        if "weight_codes" in vars(module):
            reference.get_submodule(name).weight.data = module.decoded_weight()
    want, found = CASE.gradients(reference)[1], CASE.gradients(model)[1]
    assert sqnr(want.values(), found.values()) > 100  # only linears: exact, given the weights


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"bias": "lora_only"}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("config", [None, STORED], ids=["plain", "stored"])
def test_variants_train(options, config):
    model = with_lora(convert_to_coat(CASE.build().requires_grad_(False), config), **options)
    _, grads = CASE.gradients(model)
    assert grads
    assert all(grad.isfinite().all() for grad in grads.values())


def test_adapters_in_bfloat16_over_a_float32_trunk_under_autocast():
    model = with_lora(convert_to_coat(CASE.build()))
    with torch.autocast("cpu", torch.bfloat16):
        out = CASE.output(model(**CASE.inputs()))
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "lora_" in n)


class KohyaLoRA(nn.Module):
    """As sd-scripts and ai-toolkit put adapters on: the layer's forward becomes an attribute that calls the one it had."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)
        self.original = layer.forward
        layer.forward = self.forward

    def forward(self, x):
        return self.original(x) + self.up(self.down(x))


def test_adapters_of_sd_scripts():
    """They match layers by the class name "Linear" and keep the bound method: conversion has to come first."""
    model = convert_to_coat(CASE.build().requires_grad_(False))
    adapters = [KohyaLoRA(m) for n, m in model.named_modules() if m.__class__.__name__ == "Linear" and n.endswith(("q_proj", "up_proj"))]
    assert len(adapters) == 4
    CASE.gradients(model)
    assert all(adapter.down.weight.grad is not None and adapter.up.weight.grad.any() for adapter in adapters)

    late = CASE.build().requires_grad_(False)
    KohyaLoRA(late.model.layers[0].mlp.up_proj)
    convert_to_coat(late)
    left = {row.name: row.outcome for row in conversion_report(late).left}
    assert "its forward was replaced" in left["model.layers.0.mlp.up_proj"]


def test_merging_says_it_once():
    model = with_lora(replace_linear_with_fp8(CASE.build().requires_grad_(False), STORED))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        model.merge_adapter()
    assert len([each for each in said if each.category is CoatWarning]) == 1
