"""pytest-benchmark microbenchmarks of group quantize and dequantize on the CPU. `make bench-micro` runs them."""

from __future__ import annotations

import pytest
import torch

from .quantize_rows import BASELINE, QUANTIZERS, check
from .works import BF16, F32

pytest.importorskip("pytest_benchmark")

NUMEL = 1 << 22
OURS = [quantizer for quantizer in QUANTIZERS if quantizer is BASELINE or quantizer.name.startswith("coat")]


@pytest.mark.parametrize("quantizer", OURS, ids=lambda quantizer: quantizer.name)
@pytest.mark.parametrize("dtype", (F32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("direction", ("quantize", "dequantize"))
def test_group_quant(benchmark, quantizer, dtype, direction):
    benchmark.group = f"{direction}, 4.2M {str(dtype).removeprefix('torch.')}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUMEL, generator=generator).to(dtype)
    x = x if quantizer.signed else x.abs()
    benchmark.extra_info.update(check(quantizer, x))
    if direction == "quantize":
        benchmark.pedantic(quantizer.encode, (x,), rounds=15, warmup_rounds=2)
    else:
        benchmark.pedantic(quantizer.decode, (quantizer.encode(x), dtype), rounds=15, warmup_rounds=2)
