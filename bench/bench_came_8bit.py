"""pytest-benchmark microbenchmarks of the CAME step on the CPU, by phase and profile, beside FP8AdamW's. `make bench-micro` runs them.

The works are LoRA factors of either form, 2.4M parameters. Each is measured only after a step was held to the reference.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coat_kernels.formats import get_codec
from coat_kernels.ops.adamw_fp8 import AdamWFP8Bucket, Hyperparameters, StateFormat
from coat_kernels.ops.bucket import Bucket
from coat_kernels.ops.came_8bit import CameBucket, CameFormat, CameSettings
from coat_kernels.ops.came_8bit.settings import PHASES

pytest.importorskip("pytest_benchmark")

COUNT = 48
SHAPES = {"16x3072": (16, 3072), "3072x16": (3072, 16)}
STORED = {"edge_suppression": True, "spatial_awareness": True, "lora_rank_penalty": True}
PENALTIES = {"edge_penalty": 0.1, "frequency_penalty": 0.05, "rank_penalty_strength": 0.01, "background_regularization": True}
AMP = {"lr": 1e-4, "betas": (0.8, 0.99, 0.999), "weight_decay": 5e-4, "eta": 2.0}
PAPER = CameFormat(rule="came"), CameSettings(lr=1e-4, betas=(0.9, 0.999, 0.9999))

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def tensors(shape: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).mul_(0.02) for _ in range(COUNT)]
    return params, [torch.randn(shape, generator=generator).mul_(1e-3) for _ in range(COUNT)]


def fresh(params: list[Tensor], fmt: Any) -> list[dict[str, Tensor]]:
    states = []
    for param in params:
        state = {"step": torch.zeros(())}
        for array in fmt.arrays(param.shape):
            whole = torch.full(array.shape, array.fill, dtype=array.dtype)
            state.update({name: whole[:, i] for i, name in enumerate(array.columns)} if array.columns else {array.name: whole})
        states.append(state)
    return states


def measure(benchmark: Any, bucket: type[Bucket], fmt: Any, hyper: Any, shape: tuple[int, int]) -> None:
    benchmark.group = f"CAME step, {COUNT} x {shape[0]}x{shape[1]}"
    params, grads = tensors(shape)
    twin = params[0].clone()
    start = twin.clone()
    bucket([twin], grads[:1], fresh([twin], fmt), [0], fmt, use_reference=True).step(hyper, grads[:1])
    steps = bucket(params, grads, fresh(params, fmt), list(range(COUNT)), fmt)
    steps.step(hyper, grads)
    update = float((twin - start).abs().max())
    # Float32 sums over the tensor reach every update, and the parameter is rounded after decay and after update. FP8 codes one step
    # beside wait for the next step; a sign or an edge within rounding of its limit is one element in thousands.
    assert ((params[0] - twin).abs() > 1e-5 * update + 2.4e-7 * twin.abs()).sum() <= 2e-4 * twin.numel()
    benchmark.pedantic(steps.step, (hyper, grads), rounds=15, warmup_rounds=2)


@every_shape
@pytest.mark.parametrize("penalties", (True, False), ids=("balanced", "memory_optimized"))
@pytest.mark.parametrize("phase", PHASES)
def test_cameamp(benchmark, phase, penalties, shape):
    grad_l1 = float(sum(grad.abs().sum() for grad in tensors(shape)[1]))
    fmt = CameFormat(phase=phase, **(STORED if penalties else {}))
    measure(benchmark, CameBucket, fmt, CameSettings(**AMP, grad_l1=grad_l1, **(PENALTIES if penalties else {})), shape)


@every_shape
def test_came(benchmark, shape):
    measure(benchmark, CameBucket, *PAPER, shape)


@every_shape
def test_fp8_adamw(benchmark, shape):
    codec = get_codec("e4m3_expand")
    hyper = Hyperparameters(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=5e-4)
    measure(benchmark, AdamWFP8Bucket, StateFormat(codec, codec), hyper, shape)
