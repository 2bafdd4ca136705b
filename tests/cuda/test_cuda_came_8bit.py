"""The fused CAME step in CUDA, emulated or on a GPU, against the PyTorch reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coat_kernels.formats.dynamic8 import decode_blocks
from coat_kernels.ops.came_8bit import CameBucket, CameFormat, CameSettings, cuda

#: Matrices wide, tall, square and degenerate, with and without a tail; vectors, a scalar and nothing.
SHAPES = ((16, 300), (300, 16), (33, 65), (3, 3), (2, 40), (40, 1), (7, 3, 5), (1030,), (1,), (), (0, 4))
ALL = {"edge_suppression": True, "spatial_awareness": True, "lora_rank_penalty": True}
CAME = CameSettings(1e-2, (0.9, 0.999, 0.9999), weight_decay=0.1)
PENALTIES = {"edge_penalty": 0.1, "frequency_penalty": 0.05, "rank_penalty_strength": 0.02, "background_regularization": True}
CAMEAMP = CameSettings(
    **{"lr": 2e-4, "betas": (0.9, 0.999, 0.9999), "clip_threshold": 0.05, "weight_decay": 0.1, "grad_l1": 200.0, "eta": 2.0},
    **{"low_rank_emphasis": 1.2, "detail_preservation": 600.0, **PENALTIES},
)
#: Sums in another order, a few roots and quotients: float32 roundings, some of which add up over a column.
RTOL = 2e-5


class Tensors:
    """Parameters, gradients and fresh states of every shape on one device, and their bucket."""

    def __init__(self, fmt: CameFormat, *dtypes: torch.dtype, device: torch.device | str = "cpu", offset: int = 0) -> None:
        self.fmt, self.device, self.offset = fmt, device, offset
        self.param_dtype, self.grad_dtype = dtypes or (torch.float32, torch.float32)
        self.params = self._tensors(1, self.param_dtype)
        self.states = []
        for p in self.params:
            state = {a.name: torch.full(a.shape, a.fill, dtype=a.dtype, device=device) for a in fmt.arrays(p.shape)}
            self.states.append({**state, "step": torch.zeros(())})
        self.grads = self._tensors(2, self.grad_dtype)
        self.bucket = CameBucket(self.params, self.grads, self.states, list(range(len(SHAPES))), fmt, use_reference=True)

    def _tensors(self, seed: int, dtype: torch.dtype) -> list[Tensor]:
        sizes = [math.prod(shape) for shape in SHAPES]
        flat = torch.randn(sum(sizes) + self.offset, generator=torch.Generator().manual_seed(seed))
        for part, shape in zip(flat[self.offset :].split(sizes), SHAPES, strict=True):
            if len(shape) > 1 and seed > 1:
                part.view(shape)[::3] *= 0.01  # rows of background
        parts = flat.to(self.device, dtype)[self.offset :].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, SHAPES, strict=True)]

    def set_grads(self, step: int) -> None:
        self.grads = self._tensors(2 + step, self.grad_dtype)
        self.bucket.set_grads(self.grads)

    def step(self, hyper: CameSettings) -> None:
        self.bucket.step(hyper, self.grads)

    def step_cuda(self, hyper: CameSettings, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a bucket on a GPU does, whose table of pointers is on its device."""
        table = self.bucket.table.host.to(self.device)
        monkeypatch.setattr(type(self.bucket.table), "on_device", lambda _: table)
        self.bucket._step_gpu(hyper)

    def copy_from(self, other: Tensors) -> None:
        for mine, theirs in zip(self.params, other.params, strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(self.states, other.states, strict=True):
            for name in mine:
                mine[name].copy_(theirs[name])


def compare(got: Tensors, want: Tensors, before: list[Tensor]) -> None:
    fmt = want.fmt
    for i, shape in enumerate(SHAPES):
        old, g, w = before[i].float(), got.params[i].cpu().float(), want.params[i].float()
        unit = 2.0**-23 if want.param_dtype == torch.float32 else 1.01 * torch.finfo(want.param_dtype).eps
        size = (w - old).abs()
        wrong = (g - w).abs() > w.abs() * unit + old.abs() * 2.0**-23 + size * 1e-4 + size.mean() * 1e-4
        assert not wrong.any(), f"param {shape}: {int(wrong.sum())} wrong, {g[wrong][:3].tolist()} for {w[wrong][:3].tolist()}"
        for name, expected in want.states[i].items():
            stored = got.states[i][name].cpu()
            label = f"{name} of {shape}"
            if name == "exp_avg" and fmt.use_8bit:
                stored, expected = (
                    decode_blocks(t.states[i][name].cpu(), t.states[i]["exp_avg_absmax"].cpu(), fmt.block_size, signed=True)
                    for t in (got, want)
                )
                differ = ~torch.isclose(stored, expected, rtol=RTOL, atol=1e-9)
                # codes at a boundary, where m is rounded apart
                assert float(differ.float().mean()) <= (0.01 if differ.numel() > 100 else 0.2) if differ.numel() else True, label
            elif stored.dtype in (torch.uint8, torch.int8) and name != "polarity":
                differ = (stored.int() - expected.int()).abs()
                assert int(differ.max() if differ.numel() else 0) <= 1, label
                assert not differ.numel() or float((differ > 0).float().mean()) <= (0.01 if differ.numel() > 100 else 0.2), label
            elif stored.dtype == torch.bfloat16:
                torch.testing.assert_close(stored, expected, rtol=0.01, atol=1e-6, msg=lambda m, label=label: f"{label}: {m}")
            else:
                scale = float(expected.float().abs().mean()) if expected.numel() else 0.0
                torch.testing.assert_close(stored, expected, rtol=RTOL, atol=1e-5 * scale, msg=lambda m, label=label: f"{label}: {m}")


def check(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    fmt: CameFormat,
    hyper: CameSettings,
    *dtypes: torch.dtype,
    n_steps: int = 3,
    offset: int = 0,
) -> None:
    """Steps by the kernel and by the reference, each time from the reference's state."""
    got, want = Tensors(fmt, *dtypes, device=device, offset=offset), Tensors(fmt, *dtypes, offset=offset)
    for step in range(n_steps):
        got.copy_from(want)
        before = [p.clone() for p in want.params]
        hyper = replace(hyper, lr=hyper.lr * (1.5 if step == 1 else 1))  # raised in the warm-up: masks are encoded anew
        for tensors in (got, want):
            tensors.set_grads(step)
        got.step_cuda(hyper, monkeypatch)
        want.step(hyper)
        compare(got, want, before)


@pytest.fixture(params=["teams", "one team"])
def teams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor by a thread block of its own, or by all of them together."""
    monkeypatch.setattr(cuda, "ONE_TEAM_NUMEL", 1 << 40 if request.param == "teams" else 0)


@pytest.mark.usefixtures("teams")
@pytest.mark.parametrize("phase", ["early", "middle", "late"])
@pytest.mark.parametrize("use_8bit", [True, False])
def test_cameamp_with_everything_on(phase: str, use_8bit: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    check(device, monkeypatch, CameFormat("cameamp", phase, use_8bit, **ALL), CAMEAMP)


@pytest.mark.usefixtures("teams")
@pytest.mark.parametrize("use_8bit", [True, False])
def test_came_is_the_papers(use_8bit: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    check(device, monkeypatch, CameFormat("came", use_8bit=use_8bit), CAME)


@pytest.mark.parametrize("phase", ["early", "middle", "late"])
def test_cameamp_with_everything_off(phase: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    hyper = CameSettings(1e-3, (0.9, 0.99, 0.999), maximize=True, grad_scale=torch.tensor(8.0))
    check(device, monkeypatch, CameFormat("cameamp", phase, came=False), hyper)


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic"), (torch.float16, "stochastic")])
def test_16_bit_parameters_at_odd_addresses(
    dtype: torch.dtype, rounding: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad_dtype = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    fmt = CameFormat("cameamp", "early", param_rounding=rounding, seed=-3, block_size=64, **ALL)
    check(device, monkeypatch, fmt, CAMEAMP, dtype, grad_dtype, n_steps=2, offset=1)


def test_a_found_inf_changes_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = CameFormat("cameamp", "early", **ALL)
    got, want = (Tensors(fmt, device=device) for _ in range(2))
    got.step_cuda(replace(CAMEAMP, found_inf=torch.ones(1)), monkeypatch)
    for g, w in zip(got.params, want.params, strict=True):
        assert torch.equal(g, w)
    assert all(torch.equal(g[name], w[name]) for g, w in zip(got.states, want.states, strict=True) for name in w)
