"""The bench gives numbers only to what is right, and says why where there is none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import report, timing
from bench.__main__ import main
from bench.entrants import BASELINE, ENTRANTS, SETTINGS, Entrant, state_bytes
from bench.quantize_rows import BASELINE as EAGER
from bench.quantize_rows import QUANTIZERS, Quantizer, quantize_rows
from bench.rows import read_jsonl
from bench.step_rows import Instance, bytes_per_parameter, step_rows
from bench.works import BF16, QuantizeWork, StepWork

SMALL = StepWork("small", "cpu", 3, (16, 256))
SMALL_BF16 = StepWork("small bf16", "cpu", 3, (16, 256), BF16, BF16)


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setitem(timing.COPY_NUMEL, "cpu", 1 << 16)


def rows_of(work, *entrants):
    return {row["entrant"]: row for row in step_rows(work, entrants=(BASELINE, *entrants), rounds=3, budget_s=1.0)}


def ours():
    return [entrant for entrant in ENTRANTS if entrant.name.startswith("coat") and entrant.works in SMALL.name]


@pytest.mark.parametrize("work", [SMALL, SMALL_BF16], ids=lambda work: work.name)
def test_this_package_passes_the_gate(work):
    rows = rows_of(work, *ours())
    assert len(rows) == 1 + len(ours())
    for row in rows.values():
        assert "error" not in row, row
        assert row["seconds"] > 0 and row["repetitions"] == 3
        assert row["gb_per_second"] == pytest.approx(row["bytes_per_parameter"] * work.numel / row["seconds"] / 1e9)
        assert row["share_of_copy"] == pytest.approx(row["gb_per_second"] / row["copy_gb_per_second"])


def planted(**changed):
    settings = {**SETTINGS, **changed}
    return lambda params: torch.optim.AdamW(params, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("clock", ["wall_cuda", "device_cuda"])
@pytest.mark.parametrize("fresh", [False, True], ids=["same gradients", "fresh gradients"])
def test_this_package_passes_the_gate_on_a_gpu(monkeypatch, clock, fresh):
    monkeypatch.setitem(timing.COPY_NUMEL, "cuda", 1 << 20)
    rows = rows_of(replace(SMALL, device="cuda", clock=clock, fresh_grads=fresh), *ours())
    assert len(rows) == 1 + len(ours()) and all(row["seconds"] > 0 for row in rows.values()), rows


class ForgetsItsMoments(torch.optim.AdamW):
    """The first step is right, nothing is carried to the next."""

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()


class SkipsTheLastTensor(torch.optim.AdamW):
    def step(self, closure=None):
        self.param_groups[0]["params"][-1].grad = None
        super().step(closure)


FAULTS = {
    "no weight decay": planted(weight_decay=0.0),
    "half the rate": planted(lr=SETTINGS["lr"] / 2),
    "other beta1": planted(betas=(0.7, 0.999)),
    "other beta2": planted(betas=(0.9, 0.5)),
    "forgets its moments": lambda params: ForgetsItsMoments(params, **SETTINGS),
    "skips a tensor": lambda params: SkipsTheLastTensor(params, **SETTINGS),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "float32"])
def test_a_wrong_optimizer_gets_an_error_and_no_number(fault, quantized):
    row = rows_of(SMALL, Entrant(fault, "torch", FAULTS[fault], quantized=quantized))[fault]
    assert row["error"].startswith("CheckFailed: update of step")
    assert "seconds" not in row and "ratio_to_torch_fused" not in row


def test_a_peer_that_cannot_run_is_a_row_with_the_reason():
    def breaks(params):
        raise NotImplementedError("needs a device\nof another kind")

    rows = rows_of(
        SMALL,
        Entrant("breaks", "torch", breaks),
        Entrant("absent", "no-such-distribution", breaks),
        Entrant("elsewhere", "torch", breaks, devices=("cuda",)),
    )
    assert rows["breaks"]["error"] == "NotImplementedError: needs a device"
    assert "not installed" in rows["absent"]["skipped"]
    assert rows["elsewhere"]["skipped"] == "elsewhere runs on cuda only"
    assert rows["torch fused"]["ratio_to_torch_fused"] == 1.0


def test_the_floor_follows_from_what_is_stored():
    found = {}
    for entrant in (BASELINE, *ours()):
        from bench.checks import Problem

        instance = Instance.make(entrant, Problem.make(SMALL))
        instance.check()
        found[entrant.name] = state_bytes(instance.optimizer) / SMALL.numel
    assert found == {
        "torch fused": 8.0,
        "coat e4m3": 2 + 10 / 128,
        "coat e4m3 log8": 2 + 10 / 128,
        "coat AdamW8bit": 2 + 8 / 256,
        "coat Lion8bit": 1 + 4 / 256,
    }
    # the table of the design: 28 bytes a parameter for torch, 16.16 and 10.16 here
    assert bytes_per_parameter(SMALL, 8.0) == 28
    assert bytes_per_parameter(SMALL, 2 + 10 / 128) == pytest.approx(16.16, abs=0.005)
    assert bytes_per_parameter(SMALL_BF16, 2 + 10 / 128) == pytest.approx(10.16, abs=0.005)


def test_quantizers_are_held_against_the_reference():
    work = QuantizeWork("small", "cpu", 1 << 15)
    wrong = Quantizer("wrong codes", "torch", lambda x: shifted(QUANTIZERS[1].encode(x)), QUANTIZERS[1].decode, codec="e4m3_expand")
    rows = {row["entrant"]: row for row in quantize_rows(work, quantizers=(EAGER, *QUANTIZERS[1:4], wrong), rounds=2)}
    for quantizer in QUANTIZERS[1:4]:
        for direction in ("quantize", "dequantize"):
            row = rows[f"{quantizer.name} {direction}"]
            assert row["seconds"] > 0 and row["ratio_to_torch_eager"] > 0
            assert row["bytes_per_parameter"] == pytest.approx(4 + 1 + 5 / 128)
    assert rows["wrong codes quantize"]["error"].startswith("CheckFailed") and "seconds" not in rows["wrong codes quantize"]


def test_blockwise_codes_are_held_to_the_bit():
    dynamic8 = next(quantizer for quantizer in QUANTIZERS if quantizer.name == "coat dynamic8")

    def one_off(x):
        q = dynamic8.encode(x)
        q.codes[5] += 1
        return q

    wrong = replace(dynamic8, name="one code off", encode=one_off)
    rows = {
        row["entrant"]: row for row in quantize_rows(QuantizeWork("small", "cpu", 1 << 15), quantizers=(EAGER, dynamic8, wrong), rounds=2)
    }
    assert rows["coat dynamic8 quantize"]["check"]["codes_differing"] == 0
    assert rows["coat dynamic8 quantize"]["bytes_per_parameter"] == 4 + 1 + 4 / 256
    assert rows["one code off quantize"]["error"].startswith("CheckFailed: codes or absmax differ")


def shifted(q):
    q.codes.view(torch.uint8).add_(2)
    return q


def test_runner_writes_rows_table_and_plot(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["--device", "cpu", "--quick", "--filter", "^[0-9].*fp32.*/(coat e4m3|torch eager)", "--out", str(out)]) == 0
    rows = read_jsonl(out)
    assert {row["work"] for row in rows} == {"33.5M fp32 (quick)", "400 x 16x3072 fp32 (quick)", "16.8M fp32 (quick)"}
    environment = rows[0]["environment"]
    assert environment["versions"]["torch"] and environment["commit"] and environment["cpu"] and environment["threads"] >= 1
    assert out.with_suffix(".png").stat().st_size > 10_000
    table = out.with_suffix(".md").read_text()
    assert table.count("\n") == len(rows) + 4 and "| coat e4m3 |" in table
    assert str(out) in capsys.readouterr().out


def test_runner_refuses_a_filter_that_matches_nothing(tmp_path):
    with pytest.raises(SystemExit, match=r"matches none of: 33\.5M fp32"):
        main(["--device", "cpu", "--quick", "--filter", "no such row", "--out", str(tmp_path / "rows.jsonl")])


def test_runner_fails_if_a_row_of_this_package_fails(tmp_path, monkeypatch):
    import bench.__main__ as runner

    bad = rows_of(SMALL, Entrant("coat planted", "torch", FAULTS["half the rate"]))["coat planted"]
    monkeypatch.setattr(runner, "measure", lambda arguments: [bad])
    assert main(["--device", "cpu", "--out", str(tmp_path / "rows.jsonl")]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is at hand")
def test_runner_says_so_without_a_device(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_table_shows_notes_of_rows_without_a_number(tmp_path):
    environment = {"cpu": "a cpu", "threads": 2, "versions": {"torch": "2"}, "commit": "abc"}
    row = {"work": "w", "entrant": "e", "kind": "step", "error": "broke | here", "environment": environment}
    assert "| w | e | - | - | - | - | - | - | - | broke / here |" in report.markdown([row])
    report.plot([row], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert json.loads(json.dumps(row)) == row
