"""`COATTrainer` on real models: diffusers' FLUX with PEFT's LoRA, transformers' Llama."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from coat_train import COATTrainer
from coat_train import trainer as trainer_module
from coat_train.memory import GB, PHASES, LiveStorages, MemoryLog
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from coat_kernels import CoatWarning
from coat_kernels.backends import BackendUnavailable
from coat_kernels.config import COATConfig
from coat_kernels.nn import FP8Linear, conversion_report
from coat_kernels.optim import FP8AdamW

TEXT, IMAGE, CHANNELS, WIDTH = 16, 64, 32, 128
VOCABULARY = 97
STEPS = 4


def quiet(line: str) -> None:
    """A log that nobody reads."""


def make_flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=48,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 14, 14),
    ).requires_grad_(False)
    targets = ["attn.to_q", "attn.to_v", "attn.to_out.0", "proj_mlp", "ff.net.0.proj"]
    model.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets))
    return model


def flux_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    positions = torch.zeros(IMAGE, 3)
    positions[:, 1], positions[:, 2] = torch.arange(IMAGE) // 8, torch.arange(IMAGE) % 8
    return {
        "hidden_states": torch.randn(2, IMAGE, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(2, TEXT, 48, generator=generator),
        "pooled_projections": torch.randn(2, 24, generator=generator),
        "timestep": torch.tensor([0.2, 0.7]),
        "img_ids": positions,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def flux_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch, return_dict=False)[0]
    return (out - batch["hidden_states"].roll(1, dims=1)).square().mean()


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, use_cache=False))


def llama_batch() -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def llama_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


MODELS = {"flux": (make_flux, flux_batch, flux_loss), "llama": (make_llama, llama_batch, llama_loss)}


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, trained)])


def sqnr(exact: Tensor, found: Tensor) -> float:
    return (10 * torch.log10(exact.square().sum() / (exact - found).square().sum())).item()


def saved_bytes(model: nn.Module, batch: dict[str, Tensor], loss_fn) -> int:
    with LiveStorages() as live:
        loss = loss_fn(model, batch)
    return sum(live.alive((loss,)).values())


@pytest.fixture(autouse=True)
def forget_devices():
    yield
    trainer_module._has_fp8.cache_clear()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "checkpointed"])
def test_prepared_models_have_the_gradients_of_plain_ones(kind, recompute):
    make, make_batch, loss_fn = MODELS[kind]
    batch = make_batch()
    plain = make()
    loss = loss_fn(plain, batch)
    exact, plain_bytes = gradients(plain, loss), saved_bytes(plain, batch, loss_fn)
    model = COATTrainer(COATConfig(enable_memory_efficient_checkpoint=recompute), log=quiet).prepare_model(make().train())
    assert conversion_report(model).converted
    found_loss = loss_fn(model, batch)
    # on a CPU FP8 is storage: the forward pass is float32's, its sums in another order
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert sqnr(exact, gradients(model, found_loss)) >= 25
    limit = 0.25 if recompute else 0.55
    assert saved_bytes(model, batch, loss_fn) <= limit * plain_bytes, saved_bytes(model, batch, loss_fn) / plain_bytes


def make_unet() -> UNet2DConditionModel:
    """SDXL's kind: convolutions, cross attention, GEGLU."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    sizes = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    model = UNet2DConditionModel(sample_size=16, **blocks, **sizes).requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return model


def make_wrapped_llama() -> nn.Module:
    return get_peft_model(make_llama(), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj", "down_proj"]))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", ["unet", "wrapped llama"])
def test_recomputed_blocks_of_other_models(kind, autocast):
    generator = torch.Generator().manual_seed(1)
    images = {"sample": torch.randn(2, 4, 16, 16, generator=generator), "timestep": torch.tensor([3, 9])}
    images["encoder_hidden_states"] = torch.randn(2, 8, 32, generator=generator)

    def unet_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).sample.square().mean()

    make, batch, loss_fn = {"unet": (make_unet, images, unet_loss), "wrapped llama": (make_wrapped_llama, llama_batch(), llama_loss)}[kind]
    found = []
    for prepare in (lambda model: model, COATTrainer(log=quiet).prepare_model):
        model = prepare(make().train())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_fn(model, batch)
        found.append(gradients(model, loss))
    assert sqnr(*found) >= 25


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_are_recomputed_from_8_bits_where_the_model_offers_it(kind, monkeypatch):
    make, make_batch, loss_fn = MODELS[kind]
    blocks = []

    def count(function, *args, **kwargs):
        blocks.append(kwargs["use_fp8"])
        return checkpoint(function, *args, use_reentrant=False)

    monkeypatch.setattr(trainer_module.MemoryEfficientCheckpoint, "checkpoint", count)
    for config, expected in ((COATConfig(), True), (COATConfig(use_fp8_activation=False), False)):
        blocks.clear()
        model = COATTrainer(config).prepare_model(make().train())
        loss_fn(model, make_batch()).backward()  # torch's own checkpoint inside of a converted model: both runs save the same tensors
        assert blocks == [expected] * {"flux": 3, "llama": 2}[kind]
    blocks.clear()
    loss_fn(COATTrainer(COATConfig(enable_memory_efficient_checkpoint=False)).prepare_model(make().train()), make_batch())
    assert blocks == []


@pytest.mark.parametrize("kind", MODELS)
def test_training_learns_and_logs_four_phases_a_step(kind):
    make, make_batch, loss_fn = MODELS[kind]
    lines: list[str] = []
    trainer = COATTrainer(COATConfig(enable_memory_efficient_checkpoint=kind == "llama"), log=lines.append)
    model = trainer.prepare_model(make())
    optimizer = trainer.create_optimizer((p for p in model.parameters() if p.requires_grad), lr=3e-3, min_quant_numel=0)
    twin = make()
    plain = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=3e-3)
    losses, expected = [], []
    for step in range(STEPS):
        given = {} if kind == "llama" else {"loss_fn": loss_fn}  # a Llama returns its loss itself
        losses.append(trainer.training_step(model, make_batch(), optimizer, step, **given)["loss"])
        plain.zero_grad()
        loss = loss_fn(twin, make_batch())
        expected.append(loss.item())
        loss.backward()
        plain.step()
    progress = expected[0] - expected[-1]
    assert progress > 0
    # gradients at 25 dB and more, and moments in 8 bits, change the path by a few per cent of its length
    assert losses == pytest.approx(expected, abs=0.05 * progress)
    assert [re.fullmatch(r"\[(\w+)\] Step (\d+): Allocated: \d+\.\d\dGB, Reserved: \d+\.\d\dGB", line).groups() for line in lines] == [
        (phase, str(step)) for step in range(STEPS) for phase in PHASES
    ]
    report = trainer.get_memory_report()
    assert report["total_samples"] == 4 * STEPS
    assert report["source"] == "resident set of the process"
    assert 0.05 < report["avg_allocated_gb"] <= report["peak_allocated_gb"] < 64  # a process with torch in it
    assert 0.05 < report["avg_reserved_gb"] <= report["peak_reserved_gb"] < 64
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dtype == torch.uint8]
    assert moments
    assert any(isinstance(module, FP8Linear) for module in model.modules())


def test_a_float32_trainer_is_torchs_own():
    config = COATConfig(use_fp8_optimizer=False, use_fp8_activation=False, enable_memory_efficient_checkpoint=False, log_memory_stats=False)
    lines: list[str] = []
    trainer = COATTrainer(config, log=lines.append)
    model, twin = trainer.prepare_model(make_llama()), make_llama()
    optimizer, plain = trainer.create_optimizer(model.parameters(), lr=1e-3), torch.optim.AdamW(twin.parameters(), lr=1e-3)
    assert type(optimizer) is torch.optim.AdamW
    for step in range(2):
        loss = trainer.training_step(model, llama_batch(), optimizer, step)["loss"]
        plain.zero_grad()
        expected = llama_loss(twin, llama_batch())
        expected.backward()
        plain.step()
        assert loss == expected.item()
    assert lines == []
    assert trainer.get_memory_report() == {}
    with pytest.raises(TypeError, match="use_fp8_optimizer=False, so .* has no min_quant_numel"):
        trainer.create_optimizer(model.parameters(), min_quant_numel=0)


def test_gradients_do_not_add_up_over_steps_and_stay_until_the_next():
    trainer = COATTrainer(log=quiet)
    model = nn.Sequential(nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = torch.ones(2, 8)
    found = []
    for step in range(2):
        trainer.training_step(model, batch, optimizer, step, loss_fn=lambda model, batch: model(batch).sum())
        found.append(model[0].weight.grad.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], torch.full((1, 8), 2.0))


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y, None), lambda y: {"loss": y}, lambda y: SimpleNamespace(loss=y)])
def test_the_loss_is_found_where_models_put_it(wrap):
    class Model(nn.Linear):
        def forward(self, x: Tensor):
            return wrap(super().forward(x).sum())

    model = Model(4, 1)
    expected = nn.functional.linear(torch.ones(2, 4), model.weight, model.bias).sum().item()
    optimizer = COATTrainer().create_optimizer(model.parameters())
    assert COATTrainer(log=quiet).training_step(model, [torch.ones(2, 4)], optimizer, 0) == {"loss": pytest.approx(expected)}


@pytest.mark.parametrize(
    "output, message",
    [(torch.ones(3), "a tensor of shape (3,) and no loss"), ({"sample": torch.ones(1)}, "a dict and no loss"), ("x", "a str and no loss")],
)
def test_a_model_without_a_loss_is_refused(output, message):
    model = nn.Linear(1, 1)
    model.forward = lambda x: output
    with pytest.raises(TypeError, match=re.escape(message)):
        COATTrainer(log=quiet).training_step(model, [torch.ones(1)], torch.optim.SGD(model.parameters(), lr=0.1), 0)


def test_parameters_come_in_every_form_that_torch_takes():
    trainer = COATTrainer()
    model = nn.Linear(8, 8)
    for given in (model.parameters(), list(model.named_parameters()), [{"params": model.weight}, {"params": [model.bias], "lr": 1e-2}]):
        assert isinstance(trainer.create_optimizer(given), FP8AdamW)


def test_without_fp8_training_goes_on_in_bfloat16_and_says_so_once(monkeypatch):
    def missing(op, device):
        raise BackendUnavailable(f"{op} has no kernel")

    monkeypatch.setattr(trainer_module, "require_backend", missing)
    trainer_module._has_fp8.cache_clear()
    trainer = COATTrainer(log=quiet)
    with pytest.warns(CoatWarning, match="no FP8 on cpu, training goes on in bfloat16") as said:
        model = trainer.prepare_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)))
        optimizer = trainer.create_optimizer(model.parameters())
        seen = []
        model[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        trainer.training_step(model, torch.ones(2, 8), optimizer, 0, loss_fn=lambda model, batch: model(batch).float().sum())
    assert len(said) == 1
    assert seen == [torch.bfloat16]
    assert type(optimizer) is torch.optim.AdamW
    assert not any(isinstance(module, FP8Linear) for module in model.modules())
    with pytest.raises(TypeError, match="no FP8 on this device, so .* has no param_rounding"):
        trainer.create_optimizer(model.parameters(), param_rounding="split")


def test_a_users_autocast_stays():
    model = nn.Linear(8, 1)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    trainer = COATTrainer(log=quiet)
    with torch.autocast("cpu", torch.bfloat16):
        trainer.training_step(
            model, torch.ones(2, 8), trainer.create_optimizer(model.parameters()), 0, loss_fn=lambda m, batch: m(batch).float().sum()
        )
    assert seen == [torch.bfloat16]


def test_the_report_is_the_largest_and_the_mean(monkeypatch):
    found = iter([(1 * GB, 4 * GB), (3 * GB, 4 * GB), (2 * GB, 7 * GB)])
    monkeypatch.setattr("coat_train.memory.memory_in_use", lambda device: next(found))
    lines: list[str] = []
    log = MemoryLog(lines.append)
    for step in range(3):
        log.sample(torch.device("cuda"), step, "after_forward")
    assert lines[1] == "[after_forward] Step 1: Allocated: 3.00GB, Reserved: 4.00GB"
    expected = {"peak_allocated_gb": 3.0, "avg_allocated_gb": 2.0, "peak_reserved_gb": 7.0, "avg_reserved_gb": 5.0}
    assert log.report() == {**expected, "total_samples": 3, "source": "torch's CUDA allocator"}


def test_memory_of_the_process_follows_what_it_holds():
    before = trainer_module.MemoryLog(quiet)
    before.sample(torch.device("cpu"), 0, "")
    held = torch.ones(64 << 20)  # 256 MB, written to
    after = MemoryLog(quiet)
    after.sample(torch.device("cpu"), 0, "")
    grown = (after.peak[0] - before.peak[0]) / held.nbytes
    assert 0.9 < grown < 1.3


def test_a_system_that_does_not_tell_is_said_once(monkeypatch):
    from coat_train import memory

    monkeypatch.setattr(memory, "_STATM", memory.Path("/nowhere/statm"))
    memory._say_unknown.cache_clear()
    trainer = COATTrainer(log=quiet)
    trainer.device = torch.device("cpu")
    with pytest.warns(CoatWarning, match="no memory is logged on the CPU") as said:
        trainer.log_memory(0)
        trainer.log_memory(1)
    assert len(said) == 1
    assert trainer.get_memory_report() == {}


def test_lines_go_to_standard_output(capsys):
    COATTrainer().log_memory(100, "before_forward")
    assert capsys.readouterr().out.startswith("[before_forward] Step 100: Allocated: ")


def test_a_wrong_config_is_refused():
    with pytest.raises(TypeError, match="config must be a COATConfig, got dict"):
        COATTrainer({"use_fp8_optimizer": True})
