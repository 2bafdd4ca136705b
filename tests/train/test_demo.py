"""A tiny run of the demo from end to end: what it prints, writes and promises."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from coat_train import comparison
from coat_train.cli import app
from coat_train.comparison import DemoError, Settings, reload_difference, train_base, train_loras
from coat_train.data import HELD_OUT, PHOTOGRAPHS, ImageClasses
from coat_train.measure import quantized_share, state_bytes_per_parameter
from coat_train.model import Prompts
from matplotlib.image import imread
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coat_kernels.optim import FP8AdamW

CPU = torch.device("cpu")


def test_both_optimizers_trained_on_the_same(quick):
    outcome, settings, _ = quick
    torch_run, fp8_run = outcome.runs
    assert isinstance(torch_run.optimizer, torch.optim.AdamW) and isinstance(fp8_run.optimizer, FP8AdamW)
    assert len(outcome.base.losses) == settings.base_steps
    assert len(torch_run.losses) == len(fp8_run.losses) == settings.lora_steps
    # Same weights, batch and noise: the first loss is one number; after it, 8-bit moments may differ by a little.
    assert torch_run.losses[0] == fp8_run.losses[0]
    torch.testing.assert_close(torch_run.losses, fp8_run.losses, rtol=0.02, atol=0)
    for before, after in zip(torch_run.parameters, fp8_run.parameters, strict=True):
        assert before.data_ptr() != after.data_ptr()


def test_table_holds_what_was_measured(quick):
    outcome, _, printed = quick
    torch_result, fp8_result = outcome.results
    assert torch_result.quantized == 0 and fp8_result.quantized == 1
    # AdamW: two float32 moments, and 4 bytes of step count a tensor. FP8: two codes and 2 · 5/128 bytes of metadata, again with the step
    # count; groups do not cross tensors, so tensors that are no multiple of 128 elements would pay more.
    assert torch_result.state_bytes == pytest.approx(8.0, abs=0.01)
    assert fp8_result.state_bytes == pytest.approx(2 + 10 / 128, abs=0.01)
    assert 0 < fp8_result.optimizer_ms < fp8_result.step_ms
    for result in outcome.results:
        for shown in (f"{result.loss:.4f}", f"{result.evaluation:.4f}", f"{result.state_bytes:.2f}", f"{result.quantized:.0%}"):
            assert shown in printed
        assert f"{result.optimizer_ms:.2f}" in printed and f"{result.step_ms:.1f}" in printed
    assert "100%" in printed and "largest output difference 0" in printed


def test_files(quick):
    outcome, settings, _ = quick
    picture = imread(settings.output / "demo.png")
    assert min(picture.shape[:2]) > 400 and picture.std() > 0.05
    numbers = json.loads((settings.output / "results.json").read_text())
    assert numbers["losses"]["FP8AdamW"] == outcome.runs[1].losses
    notes = (settings.output / "README.md").read_text()
    assert "scikit-image" in notes
    for photograph in PHOTOGRAPHS:
        assert f"- {photograph.name} (`skimage.data.{photograph.loader}`): {photograph.credit}" in notes


def test_reload_tells_another_lora(quick, base_folder, tmp_path):
    """Negative control of the closing check: one changed number in the file is seen."""
    outcome, settings, _ = quick
    classes = ImageClasses.load(settings.seed)
    prompts = Prompts.random(len(classes.names), settings.seed, CPU)
    arguments = (classes.evaluation[0, :2], classes.held_out, prompts)
    source = settings.output / "lora-fp8adamw" / "pytorch_lora_weights.safetensors"
    transformer = outcome.runs[1].transformer
    assert reload_difference(transformer, base_folder, source.parent, *arguments) == 0

    weights = load_file(source)
    name = next(name for name in weights if name.endswith("proj_out.lora_B.weight"))
    weights[name] = weights[name] + 0.5
    save_file(weights, tmp_path / source.name, metadata={"format": "pt"})
    with pytest.raises(DemoError, match="read back by FluxPipeline.load_lora_weights, but its output differs"):
        reload_difference(transformer, base_folder, tmp_path, *arguments)


def test_same_seed_same_losses(quick):
    outcome, settings, _ = quick
    classes = ImageClasses.load(settings.seed)
    prompts = Prompts.random(len(classes.names), settings.seed, CPU)
    base = train_base(settings, classes, prompts, lambda losses: None)
    assert base.losses == outcome.base.losses
    runs = train_loras(settings, copy.deepcopy(base.transformer), classes, prompts, lambda losses: None)
    assert [run.losses for run in runs] == [run.losses for run in outcome.runs]

    other = train_base(Settings.quick(settings.output, seed=1), classes, prompts, lambda losses: None)
    assert other.losses != base.losses


def test_training_learns():
    """Sixty steps on one class take the loss well under that of a model that predicts nothing."""
    settings = Settings(Path("unused"), base_steps=60, batch_size=8)
    classes = ImageClasses.load(0, n_train=16, n_evaluation=1)
    prompts = Prompts.random(len(classes.names), 0, CPU)
    losses = train_base(settings, classes, prompts, lambda losses: None).losses
    assert sum(losses[-10:]) < 0.6 * sum(losses[:3]) / 3 * 10


def test_measures_count_state():
    parameter = torch.nn.Parameter(torch.zeros(256))
    adamw = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(256)
    adamw.step()
    assert state_bytes_per_parameter(adamw) == (2 * 4 * 256 + 4) / 256
    assert quantized_share(adamw) == 0
    mixed = FP8AdamW([parameter, small := torch.nn.Parameter(torch.zeros(64))], min_quant_numel=100)
    small.grad = torch.ones(64)
    mixed.step()
    assert quantized_share(mixed) == 256 / 320


def test_command_line(tmp_path, monkeypatch):
    runner = CliRunner()
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: seen.append(count))
    monkeypatch.setattr(comparison, "run_demo", lambda settings, console: seen.append(settings))
    assert runner.invoke(app, ["demo", "--quick", "--output", str(tmp_path), "--device", "cpu", "--seed", "7"]).exit_code == 0
    assert seen == [1, Settings.quick(tmp_path, "cpu", 7)]

    def stop(settings, console):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "run_demo", stop)
    stopped = runner.invoke(app, ["demo", "--output", str(tmp_path)])
    assert stopped.exit_code == 130 and "Stopped" in stopped.output

    def fail(settings, console):
        raise DemoError("the LoRA differs")

    monkeypatch.setattr(comparison, "run_demo", fail)
    failed = runner.invoke(app, ["demo", "--output", str(tmp_path)])
    assert failed.exit_code == 1 and "the LoRA differs" in failed.output

    wrong = runner.invoke(app, ["demo", "--device", "abacus"])
    assert wrong.exit_code == 2 and "got 'abacus'" in wrong.output


def test_progress_shows_phase_loss_and_time_left():
    console = Console(file=io.StringIO(), width=140)
    with comparison._progress(console) as progress, comparison.progress_phase(progress, f"LoRA '{HELD_OUT}'", 2) as on_step:
        on_step([0.5, 0.25])
    printed = console.file.getvalue()
    assert f"LoRA '{HELD_OUT}'" in printed and "1/2" in printed and "loss 0.500 / 0.250" in printed and "left" in printed
