"""What only a GPU shows of the CUDA step: graphs, streams, devices, no synchronization, one launch for many tensors."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coat_kernels import _cuda
from coat_kernels.ops.step_8bit import BlockwiseFormat, Hyperparameters8bit, Step8bitBucket

pytestmark = pytest.mark.gpu

SIZES = (1, 255, 4096, 12801)
#: A learning rate that float32 holds: read from a tensor it is the same number.
HYPER = Hyperparameters8bit(lr=2.0**-7, beta1=0.9, beta2=0.99, weight_decay=0.1)


def make(rule: str = "adamw", device: str = "cuda") -> Step8bitBucket:
    fmt = BlockwiseFormat(rule)
    generator = torch.Generator().manual_seed(5)
    params = [torch.randn(n, generator=generator).to(device) for n in SIZES]
    grads = [torch.randn(n, generator=generator).to(device) for n in SIZES]
    states = []
    for p in params:
        state = {a.name: torch.full(a.shape, a.fill, dtype=a.dtype, device=device) for a in fmt.arrays(p.shape)}
        states.append({**state, "step": torch.zeros((), device=device)})
    bucket = Step8bitBucket(params, grads, states, list(range(len(SIZES))), fmt)
    bucket.held = grads  # type: ignore[attr-defined]
    return bucket


def stepped(bucket: Step8bitBucket, times: int, hyper: Hyperparameters8bit = HYPER) -> Step8bitBucket:
    for _ in range(times):
        bucket.step(hyper, bucket.held)  # type: ignore[attr-defined]
    return bucket


def assert_equal(got: Step8bitBucket, want: Step8bitBucket) -> None:
    for mine, theirs in zip(got.states, want.states, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for p, q in zip(got.params, want.params, strict=True):
        assert torch.equal(p, q)


def test_a_captured_step_replays() -> None:
    want, bucket = stepped(make(), 5), stepped(make(), 2)
    lr = torch.tensor(HYPER.lr, device="cuda")
    hyper = replace(HYPER, lr=lr)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stepped(bucket, 1, hyper)
    for _ in range(3):
        graph.replay()
    assert_equal(bucket, want)


def test_a_learning_rate_on_the_device_is_read_when_the_step_runs() -> None:
    bucket, want = make(), make()
    lr = torch.tensor(0.5, device="cuda")
    graph = torch.cuda.CUDAGraph()
    stepped(bucket, 1)
    stepped(want, 1)
    with torch.cuda.graph(graph):
        stepped(bucket, 1, replace(HYPER, lr=lr))
    lr.fill_(HYPER.lr)
    graph.replay()
    assert_equal(bucket, stepped(want, 1))


def test_steps_follow_their_stream_and_do_not_synchronize() -> None:
    want, bucket = stepped(make(), 3), stepped(make(), 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    scaler = {"grad_scale": torch.ones(1, device="cuda"), "found_inf": torch.zeros(1, device="cuda")}
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        torch.cuda.set_sync_debug_mode("error")
        try:
            stepped(bucket, 2, replace(HYPER, **scaler))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not stream.query(), "the steps did not wait behind what the stream had to do"
    stream.synchronize()
    assert_equal(bucket, want)


def test_another_thread_may_step() -> None:
    want, bucket = stepped(make(), 2), stepped(make(), 1)
    torch.cuda.synchronize()
    thread = threading.Thread(target=stepped, args=(bucket, 1))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert_equal(bucket, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_every_device_has_its_own_code() -> None:
    assert_equal(stepped(make(device="cuda:1"), 2), stepped(make(device="cuda:1"), 2))


@pytest.mark.parametrize("rule", ["adamw", "lion", "momentum"])
def test_one_launch_steps_every_tensor(rule: str) -> None:
    bucket = stepped(make(rule), 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        stepped(bucket, 1)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any(f"step_8bit_{rule}" in name for name in names)
    assert sum(event.count for event in profile.key_averages() if "8bit" in event.key) == 2, names


def test_compiled_by_nvrtc_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same bits from NVRTC's image as from the build's, whichever served above."""
    if _cuda._nvrtc() is None:
        pytest.skip("libnvrtc is not found")
    want = stepped(make(), 2)
    monkeypatch.setattr(_cuda, "_FATBINS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _cuda._function.cache_clear()
    _cuda._module.cache_clear()
    assert_equal(stepped(make(), 2), want)
    assert list((tmp_path / "coat_kernels").iterdir())
