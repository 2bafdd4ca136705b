"""pytest-benchmark microbenchmarks of blockwise quantize and dequantize on the CPU. `make bench-micro` runs them."""

from __future__ import annotations

import pytest
import torch

from .quantize_rows import QUANTIZERS, check
from .works import BF16, F32

pytest.importorskip("pytest_benchmark")

NUMEL = 1 << 22
OURS = next(quantizer for quantizer in QUANTIZERS if quantizer.name == "coat dynamic8")


@pytest.mark.parametrize("dtype", (F32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("direction", ("quantize", "dequantize"))
def test_blockwise_quant(benchmark, dtype, direction):
    benchmark.group = f"{direction} blocks, 4.2M {str(dtype).removeprefix('torch.')}"
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).to(dtype)
    benchmark.extra_info.update(check(OURS, x))
    if direction == "quantize":
        benchmark.pedantic(OURS.encode, (x,), rounds=15, warmup_rounds=2)
    else:
        benchmark.pedantic(OURS.decode, (OURS.encode(x), dtype), rounds=15, warmup_rounds=2)
