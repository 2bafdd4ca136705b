"""pytest-benchmark microbenchmarks of the blockwise 8-bit step on the CPU, by rule and storage. `make bench-micro` runs them.

Each is measured only after its first step was held to the reference. 4.2M parameters: beyond the caches, in milliseconds.
"""

from __future__ import annotations

import pytest
import torch

from coat_kernels.ops.step_8bit import RULES, BlockwiseFormat, Hyperparameters8bit, Step8bitBucket
from coat_kernels.ops.step_8bit.reference import step_8bit

pytest.importorskip("pytest_benchmark")

NUMEL = 1 << 22
HYPER = Hyperparameters8bit(lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("quantized", (True, False), ids=("dynamic8", "float32"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_step(benchmark, rule, quantized, dtype):
    benchmark.group = f"8-bit step, {rule}"
    fmt = BlockwiseFormat(rule, quantized)
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(NUMEL, generator=generator).to(dtype)
    grad = torch.randn(NUMEL, generator=generator).mul_(1e-2).to(dtype)
    state = {array.name: torch.full(array.shape, array.fill, dtype=array.dtype) for array in fmt.arrays(param.shape)}
    state["step"] = torch.zeros(())
    old = [state[name].clone() if name in state else None for name in Step8bitBucket.columns]
    want = step_8bit(param, grad, *old, step=1, index=0, fmt=fmt, hyper=HYPER)[0]
    bucket = Step8bitBucket([param], [grad], [state], [0], fmt)
    bucket.step(HYPER, [grad])
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # of float32, and a unit of bfloat16, beside parameters of 1
    assert torch.allclose(param.float(), want.float(), rtol=tolerance, atol=1e-8)
    benchmark.pedantic(bucket.step, (HYPER, [grad]), rounds=15, warmup_rounds=2)
