"""`benchmark_coat.py`: what it counts, by a second count; what it writes; how it is called."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from coat_train import benchmark as module
from coat_train.benchmark import PARTS, BenchmarkResult, BenchmarkSettings, Side, Training, largest_batch, run_benchmark
from coat_train.benchmark_model import make_batches
from coat_train.benchmark_report import result_table, write_results
from coat_train.cli import app
from coat_train.memory import GB
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
SMALL = BenchmarkSettings(hidden_size=256, num_layers=2, batch_size=2, num_steps=4, seq_len=64, use_fp8_activation=True, lr=1e-3)


@pytest.fixture(scope="module")
def result() -> BenchmarkResult:
    return run_benchmark(SMALL)


def batch_of(settings: BenchmarkSettings, size: int) -> dict[str, torch.Tensor]:
    return make_batches(settings.hidden_size, size, settings.tokens, 1, torch.device("cpu"))[0]


def test_parts_of_the_standard_side(result):
    memory = result.standard.memory
    assert set(memory) == set(PARTS)
    numel = sum(parameter.numel() for parameter in Training(SMALL, "standard").model.parameters())
    assert memory["parameters"] == memory["gradients"] == 4 * numel
    assert 8 * numel < memory["optimizer_state"] < 8.01 * numel  # two float32 moments, and the step counts
    copies = sum(2 * parameter.numel() for name, parameter in Training(SMALL, "standard").model.named_parameters() if "norm" not in name)
    assert memory["saved_beside"] == pytest.approx(copies, rel=0.02)  # autocast's bfloat16 weights


def test_parts_of_coats_side(result):
    standard, coat = result.standard.memory, result.coat.memory
    ratios = result.ratios()
    assert coat["parameters"] == standard["parameters"]
    assert coat["gradients"] == standard["gradients"]
    assert ratios["optimizer_state"] <= 0.27
    assert ratios["saved_activations"] <= 0.45
    assert coat["saved_beside"] <= 0.02 * standard["saved_beside"]  # weights are cast for each product and not kept
    assert ratios["total"] == pytest.approx(sum(coat.values()) / sum(standard.values()))


def test_saved_bytes_are_those_that_autograd_packs():
    """A second count of the standard side: distinct storages that autograd saves, without parameters, batch and loss."""
    settings = replace(SMALL, precision="fp32")
    training, batch = Training(settings, "standard"), batch_of(settings, 2)
    known = {t.untyped_storage().data_ptr() for t in (*training.model.parameters(), *batch.values())}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = training.forward(batch)
    expected = sum(tensor.untyped_storage().nbytes() for pointer, tensor in seen.items() if pointer not in known)
    assert loss.requires_grad
    found = training.saved_bytes(batch)
    assert found == pytest.approx(expected, rel=1e-3)  # the graph holds a few numbers more: random states of attention


def test_both_sides_start_equal_and_learn_alike(result):
    one, other = (Training(SMALL, name) for name in ("standard", "coat"))
    batch = batch_of(SMALL, 2)
    assert one.forward(batch).item() == pytest.approx(1.0, abs=0.05)
    assert other.forward(batch).item() == pytest.approx(one.forward(batch).item(), rel=1e-3)
    assert len(result.standard.losses) == len(result.coat.losses) == SMALL.num_steps
    assert result.standard.losses[-1] < result.standard.losses[0]
    assert result.coat.losses == pytest.approx(result.standard.losses, rel=0.01)


def test_time_is_the_median_of_ratios_within_a_step(result):
    pairs = zip(result.coat.step_ms, result.standard.step_ms, strict=True)
    assert result.time_ratio == pytest.approx(statistics.median(coat / standard for coat, standard in pairs))
    assert len(result.coat.step_ms) == SMALL.num_steps


def test_the_largest_batch_by_bytes_is_the_largest(result):
    for side in (result.standard, result.coat):
        fixed = side.total - side.memory["saved_activations"]
        assert (
            fixed + side.largest_batch * side.bytes_a_sample <= SMALL.memory_bytes < fixed + (side.largest_batch + 1) * side.bytes_a_sample
        )
        assert side.batch_by_bytes(fixed - 1) == 0
    assert result.coat.largest_batch >= 2 * result.standard.largest_batch
    assert any("computed from the counted bytes for 24 GB" in note for note in result.notes)
    assert replace(SMALL, memory_gb=2.0).memory_bytes == 2 * GB


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 1000, module.LARGEST_BATCH - 1, module.LARGEST_BATCH, 10**9])
def test_search_by_trial(limit):
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest_batch(fits) == min(limit, module.LARGEST_BATCH)
    assert len(tried) <= 40
    assert max(tried) <= module.LARGEST_BATCH


def test_running_out_of_memory_is_an_answer(monkeypatch):
    """The search on a GPU, with a GPU that is not there."""
    fractions = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * GB, 8 * GB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)

    def step(self, batch):
        if len(batch["x"]) > 11:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.0

    monkeypatch.setattr(Training, "step", step)
    assert module._largest_by_trial(replace(SMALL, hidden_size=16, seq_len=2, memory_gb=2.0), "coat") == 11
    assert fractions == [0.25, 1.0]


def test_the_file_has_what_the_table_shows(result, tmp_path):
    path = tmp_path / "results.json"
    path.write_text("an older file")
    write_results(result, path)
    found = json.loads(path.read_text())
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]
    assert found["settings"]["hidden_size"] == 256
    assert found["coat_over_standard"]["step_time"] == result.time_ratio
    for name, side in (("standard", result.standard), ("coat", result.coat)):
        assert found[name]["memory_bytes"]["total"] == sum(side.memory.values())
        assert found[name]["losses"] == side.losses
        assert found[name]["largest_batch"] == side.largest_batch
    table = result_table(result)
    assert table.row_count == len(PARTS) + 4
    assert list(table.columns[3].cells)[3] == f"{result.ratios()['saved_activations']:.3f}"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 100}, "hidden_size must be a multiple of 64"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"precision": "fp16"}, "choose 'bf16' or 'fp32'"),
        ({"memory_gb": -1.0}, "must be positive"),
        ({"use_fp8_optimizer": False, "use_fp8_activation": False}, "both sides are the same"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def arguments(output: Path, *more: str) -> list[str]:
    """Users' command line, at a size for tests."""
    sizes = ["--hidden_size", "64", "--num_layers", "1", "--batch_size", "2", "--num_steps", "2"]
    return [*sizes, "--use_fp8_activation", "--output", str(output), *more]


def test_the_command_of_guides(tmp_path):
    """`python benchmark_coat.py`, from the repository's bench folder, in a process of its own."""
    output = tmp_path / "new" / "benchmark_results.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]), "COLUMNS": "120"}
    run = subprocess.run(
        [sys.executable, "benchmark_coat.py", *arguments(output)], cwd=ROOT / "bench", env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "saved activations" in run.stdout
    assert json.loads(output.read_text())["settings"]["use_fp8_activation"] is True


def test_coat_bench_model(tmp_path):
    output = tmp_path / "results.json"
    found = CliRunner().invoke(app, ["bench", "model", *arguments(output, "--seq-len", "8", "--precision", "fp32", "--no-fp8-activation")])
    assert found.exit_code == 0, found.output
    assert json.loads(output.read_text())["settings"]["use_fp8_activation"] is False
    assert "COAT / standard" in found.output


def test_the_installed_name_runs_the_same_command():
    import coat_implementation.benchmark_coat as installed
    from coat_train import cli

    assert installed.bench_model is cli.bench_model


@pytest.mark.parametrize(
    "more, message",
    [(("--hidden_size", "100"), "multiple of 64"), (("--device", "tpu"), "got 'tpu'")],
)
def test_bad_arguments(tmp_path, more, message):
    found = CliRunner().invoke(app, ["bench", "model", *arguments(tmp_path / "results.json", *more)])
    assert found.exit_code == 2
    assert message in found.output


def test_a_file_that_cannot_be_written_is_said_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("coat_train.benchmark_report.run_benchmark", lambda *_: pytest.fail("the training started"))
    found = CliRunner().invoke(app, ["bench", "model", *arguments(tmp_path)])
    assert found.exit_code == 1
    assert "is a folder; --output names the file" in " ".join(found.output.split())


def test_side_counts_its_total():
    assert Side(memory={"parameters": 2, "gradients": 3}).total == 5
