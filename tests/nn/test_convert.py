"""convert_to_coat and replace_linear_with_fp8 on models of diffusers and transformers: results, gradients, reports, bad input."""

from __future__ import annotations

import copy
import io
from collections import Counter

import pytest
import torch
from torch import nn

from coat_kernels import CoatWarning
from coat_kernels.autograd import saved
from coat_kernels.config import COATConfig
from coat_kernels.nn import FP8GELU, FP8LayerNorm, FP8Linear, FP8SiLU, conversion_report, convert_to_coat, replace_linear_with_fp8
from coat_kernels.nn._diffusers import NormRopeProcessor
from tests.accuracy import sqnr
from tests.nn.blocks import Block, add_lora, flux, llama
from tests.nn.models import CASES

#: Class names of what is converted in each model.
CONVERTED = {
    "flux": {"Linear": 48, "AdaLayerNormZero": 4, "AdaLayerNormZeroSingle": 2, "AdaLayerNormContinuous": 1, "FluxAttention": 4}
    | {"RMSNorm": 12, "LayerNorm": 4, "GELU": 6},
    "sd3": {"Linear": 36, "AdaLayerNormZero": 2, "SD35AdaLayerNormZeroX": 1, "AdaLayerNormContinuous": 2}
    | {"RMSNorm": 10, "LayerNorm": 3, "GELU": 3},
    "sdxl": {"Linear": 60, "LayerNorm": 12, "GEGLU": 4, "SiLU": 9},
    "llama": {"Linear": 15, "LlamaRMSNorm": 5, "LlamaMLP": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_forward_is_kept_and_gradients_are_close(name):
    case = CASES[name]
    plain = case.build()
    model = convert_to_coat(copy.deepcopy(plain))
    assert Counter(row.kind for row in conversion_report(model).converted) == CONVERTED[name]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    (y, grads), (y8, grads8) = case.gradients(plain), case.gradients(model)
    assert sqnr(y, y8) > 110  # float32 roundings: nothing on the way forward is quantized
    assert grads.keys() == grads8.keys()
    together = sqnr(grads.values(), grads8.values())
    assert 30 <= together < 70
    # sums over rows with cancellation lose some of it; where they cancel to nothing (a bias before a GroupNorm) noise is left
    floor = 1e-4 * max(grad.norm() for grad in grads.values())
    assert min(sqnr(grads[n], grads8[n]) for n in grads if grads[n].norm() > floor) > 20
    again = case.gradients(model)[1]
    assert all(again[n].equal(grads8[n]) for n in grads)  # deterministic


@pytest.mark.parametrize("config", [COATConfig(activation_format="auto", activation_group_size=32), COATConfig(activation_format="int8")])
def test_other_formats_are_as_close_or_closer(config):
    case = CASES["flux"]
    plain = case.build()
    grads = case.gradients(plain)[1].values()
    e4m3, other = (sqnr(grads, case.gradients(convert_to_coat(copy.deepcopy(plain), c))[1].values()) for c in (COATConfig(), config))
    assert other > e4m3


def test_bfloat16_models_lose_no_more_than_bfloat16_does():
    case = CASES["llama"]
    plain = case.build()
    (exact, grads), low = case.gradients(plain), copy.deepcopy(plain).to(torch.bfloat16)
    y, low_grads = case.gradients(low)
    y8, grads8 = case.gradients(convert_to_coat(low))
    assert sqnr(exact, y8) > sqnr(exact, y) - 1
    # noise of bfloat16, and that of e4m3 beside it
    noise = 10 ** (-sqnr(grads.values(), low_grads.values()) / 10) + 10**-3
    assert sqnr(grads.values(), grads8.values()) > -10 * torch.tensor(noise).log10() - 1


def test_accumulation_is_the_sum():
    case = CASES["llama"]
    model = convert_to_coat(case.build())
    once = case.gradients(model)[1]
    for _ in range(2):
        out = case.output(model(**case.inputs()))
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        (out - target).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, 3 * once[name], rtol=1e-5, atol=1e-8)


def test_copies_and_saved_models_work_alike():
    case = CASES["flux"]
    model = convert_to_coat(case.build())
    y, grads = case.gradients(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        y2, grads2 = case.gradients(again)
        assert y2.equal(y)
        assert all(grads2[n].equal(grads[n]) for n in grads)
        assert conversion_report(again) == conversion_report(model)


def test_nothing_is_watched_outside_of_the_forward_pass():
    model = convert_to_coat(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)))
    assert saved._current() is None
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(8, 63))
    assert saved._current() is None
    with torch.no_grad():
        model(torch.randn(8, 64))
    nested = nn.Sequential(model, convert_to_coat(nn.Sequential(nn.Linear(4, 4))))
    nested(torch.randn(128, 64)).sum().backward()
    assert saved._current() is None


def test_reentrant_calls_keep_their_contexts_apart():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x, depth=1):
            return self.layer(self(x, depth - 1) if depth else x)

    model = convert_to_coat(Twice())
    x = torch.randn(128, 64, requires_grad=True)
    model(x).sum().backward()
    assert saved._current() is None
    assert x.grad is not None


# --- FLUX's attention


def flux_attention(model):
    return model.transformer_blocks[0].attn


def test_flux_attention_takes_the_original_road_while_its_norms_are_trained():
    case = CASES["flux"]
    plain = case.build()
    model = convert_to_coat(copy.deepcopy(plain))
    processor = flux_attention(model).processor
    assert type(processor) is NormRopeProcessor
    calls = []

    class Counted(type(processor.original)):
        def __call__(self, *args):
            calls.append(1)
            return super().__call__(*args)

    processor.original = Counted()
    case.gradients(model)
    assert calls
    calls.clear()
    for each in model.modules():
        if "norm_q" in dict(each.named_children()):
            each.norm_q.requires_grad_(False), each.norm_k.requires_grad_(False)
            if each.added_kv_proj_dim is not None:
                each.norm_added_q.requires_grad_(False), each.norm_added_k.requires_grad_(False)
    y, grads = case.gradients(model)
    assert not calls
    want_y, want = case.gradients(plain)
    assert sqnr(want_y, y) > 110
    assert sqnr([want[n] for n in grads], grads.values()) > 30


def test_flux_attention_with_weights_near_zero_keeps_its_norms():
    model = CASES["flux"].build()
    with torch.no_grad():
        flux_attention(model).norm_k.weight[3] = 1e-6
    convert_to_coat(model)
    report = conversion_report(model)
    (row,) = [row for row in report.left if row.kind == "FluxAttention"]
    assert row.name == "transformer_blocks.0.attn"
    assert type(flux_attention(model).processor).__name__ == "FluxAttnProcessor"
    assert type(model.transformer_blocks[1].attn.processor) is NormRopeProcessor


def test_loading_weights_near_zero_brings_the_norms_back():
    model = convert_to_coat(CASES["flux"].build())
    state = model.state_dict()
    model.load_state_dict(state)
    assert type(flux_attention(model).processor) is NormRopeProcessor
    state = {n: p.clone() for n, p in state.items()}
    state["transformer_blocks.0.attn.norm_added_q.weight"][0] = 0
    with pytest.warns(CoatWarning, match="norm_rope does not run with the loaded weights"):
        model.load_state_dict(state)
    assert type(flux_attention(model).processor).__name__ == "FluxAttnProcessor"


def test_attention_backends_reach_the_processor():
    processor = flux_attention(convert_to_coat(CASES["flux"].build())).processor
    assert hasattr(processor, "_attention_backend")  # diffusers' set_attention_backend looks for it, and then sets it
    processor._attention_backend = "native"
    assert processor.original._attention_backend == processor._attention_backend == "native"


# --- what is converted and what is said


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.SiLU(inplace=True), nn.GroupNorm(2, 8), nn.Linear(8, 4))


def test_the_report_says_what_and_why():
    model = convert_to_coat(small())
    assert [type(m) for m in model[:3]] == [FP8Linear, FP8LayerNorm, FP8GELU]
    report = conversion_report(nn.Sequential(model))
    assert [row.name for row in report.converted] == ["0", "1", "2", "5"]
    assert {row.name: row.outcome for row in report.left} == {
        "3": "it overwrites its input",
        "4": "GroupNorm: no 8-bit form; compress_saved_activations packs what it saves",
    }
    text = str(report)
    assert "converted 4 modules, left 2" in text
    assert "converted: 2 x Linear -> FP8Linear (0, 5)" in text
    assert "left: 1 x SiLU because it overwrites its input (3)" in text


def test_only_linears():
    model = replace_linear_with_fp8(small())
    assert [type(m) for m in model[:3]] == [FP8Linear, nn.LayerNorm, nn.GELU]
    assert type(model) is nn.Sequential
    convert_to_coat(model)  # the rest
    assert type(model[1]) is FP8LayerNorm
    assert [row.name for row in conversion_report(model).converted] == ["0", "5", "1", "2"]


def test_a_filter():
    model = convert_to_coat(small(), filter_fn=lambda module, name: name != "0")
    assert type(model[0]) is nn.Linear
    assert type(model[5]) is FP8Linear
    assert {row.name: row.outcome for row in conversion_report(model).left}["0"] == "filter_fn"


def test_frozen_weights_are_stored_trained_ones_are_not():
    model = small()
    model[0].requires_grad_(False)
    replace_linear_with_fp8(model, COATConfig(frozen_weight_format="e4m3"))
    outcomes = {row.name: row.outcome for row in conversion_report(model).converted}
    assert outcomes == {"0": "FP8Linear, weight in FP8", "5": "FP8Linear, weight trained and so not stored in FP8"}
    assert model[0].weight_codes.dtype == torch.uint8


def test_tied_weights_are_not_stored_beside_themselves():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)).requires_grad_(False)
    model[2].weight = model[0].weight
    convert_to_coat(model, COATConfig(frozen_weight_format="e4m3"))
    assert model[2].weight is model[0].weight
    assert model[1].weight_codes.dtype == torch.uint8


def test_weights_that_others_read_directly():
    """torch's encoder layer hands its linears' weights to a fused kernel."""
    plain = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().requires_grad_(False)
    model = convert_to_coat(copy.deepcopy(plain), COATConfig(frozen_weight_format="e4m3"))
    x = torch.randn(2, 5, 16)
    assert 25 < sqnr(plain(x), model(x)) < 60
    assert {row.name: row.outcome for row in conversion_report(model).left}["self_attn.out_proj"].startswith("a subclass")


def test_a_forward_pass_past_the_hooks_is_right_all_the_same():
    case = CASES["llama"]
    plain = case.build()
    model = convert_to_coat(copy.deepcopy(plain))
    y, grads = case.gradients(plain)
    out = case.output(model.forward(**case.inputs()))
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    (out - target).square().mean().backward()
    assert sqnr(y, out) > 110
    assert sqnr(grads.values(), [p.grad for p in model.parameters()]) > 28


def test_modules_that_something_else_has_changed_are_left():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(nn.Linear(4, 4), Odd(4, 4), nn.Linear(4, 4))
    original = model[0].forward
    model[0].forward = lambda x: 2 * original(x)
    convert_to_coat(model)
    assert "its forward was replaced" in {row.name: row.outcome for row in conversion_report(model).left}["0"]
    assert "a subclass with a forward pass of its own" in {row.name: row.outcome for row in conversion_report(model).left}["1"]


def test_a_second_conversion_is_said_and_not_done():
    model = convert_to_coat(small())
    cls = type(model)
    report = conversion_report(model)
    for again in (model, nn.Sequential(model)):
        with pytest.warns(CoatWarning, match="this model is converted already"):
            assert convert_to_coat(again) is again
    with pytest.warns(CoatWarning, match="the linear layers of this model are converted already"):
        replace_linear_with_fp8(model)
    assert type(model) is cls
    assert conversion_report(model) == report


@pytest.mark.parametrize("convert", [convert_to_coat, replace_linear_with_fp8])
def test_bad_input(convert):
    with pytest.raises(ValueError, match=r"Sequential has no torch.nn.Linear"):
        convert(nn.Sequential(nn.Conv2d(1, 1, 1)))
    model = small()
    with pytest.raises(ValueError, match=r"filter_fn\(module, name\) accepted none of \d modules"):
        convert(model, filter_fn=lambda module, name: False)
    assert type(model[0]) is nn.Linear
    assert type(model) is nn.Sequential
    with pytest.raises(TypeError, match="config must be a COATConfig, got dict"):
        convert(model, {"activation_format": "e4m3"})
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        convert([model])
    with pytest.raises(ValueError, match="this model was not converted"):
        conversion_report(model)


def test_activations_switched_off():
    model = small()
    assert convert_to_coat(model, COATConfig(use_fp8_activation=False)) is model
    assert type(model[0]) is nn.Linear
    assert type(model) is nn.Sequential


@pytest.mark.parametrize("cls", [FP8GELU, FP8SiLU])
def test_converted_modules_are_still_torchs(cls):
    assert isinstance(cls(), cls.__mro__[2])


@pytest.mark.parametrize("build", [flux, llama], ids=["flux", "llama"])
def test_converted_blocks_compile_in_full(build):
    sizes = {"kind": "single", "image": 24, "text": 8} if build is flux else {"tokens": 16, "batch": 2}
    block = build(width=64, heads=2, dtype=torch.float32, **sizes)
    if build is flux:
        add_lora(block.module)
    convert_to_coat(block.module)
    torch._dynamo.reset()
    compiled = Block(torch.compile(block.module, fullgraph=True, backend="aot_eager"), block.inputs, block.tokens)
    results = []
    for each in (block, compiled):
        block.module.zero_grad()
        out = each.run()
        sum(y.square().mean() for y in out).backward()
        results.append((out, [p.grad for p in block.module.parameters() if p.grad is not None]))
    (out, grads), (out8, grads8) = results
    assert sqnr(out, out8) > 110
    # what the hooks rebuild, the compiler saves in 8 bits of its own: two errors, each of 31.5 dB for e4m3
    assert sqnr(grads, grads8) > 28
    assert saved._current() is None


@pytest.mark.parametrize("name", ["flux", "sdxl", "llama"])
def test_gradient_checkpointing_of_the_model_itself(name):
    """The second run of a checkpointed block lies outside of the context that the first lay in, and must save the same tensors."""
    case = CASES[name]
    plain = case.build()
    model = convert_to_coat(copy.deepcopy(plain)).train()
    if name == "llama":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.enable_gradient_checkpointing()
    (y, grads), (y8, grads8) = case.gradients(plain), case.gradients(model)
    assert sqnr(y, y8) > 110
    # the inputs of a block are packed, too, and what it recomputes from them has their error: e4m3's 31.5 dB through two blocks
    assert sqnr(grads.values(), grads8.values()) > 22
