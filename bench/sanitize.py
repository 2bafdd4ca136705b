"""A short script for compute-sanitizer: every kernel once, on sizes that end inside a group and inside a tile.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.sanitize
"""

from __future__ import annotations

import itertools
import os

import torch

import coat_kernels
from coat_kernels.optim import FP8AdamW, FP8QuantizationConfig

SIZES = (0, 1, 127, 128, 129, 511, 513, 3072, 4097)


def quantizers() -> None:
    for dtype, (fmt, expand) in itertools.product(
        (torch.float32, torch.bfloat16), (("e4m3", True), ("e4m3", False), ("e5m2", True), ("log8", True))
    ):
        for size in SIZES:
            x = torch.rand(size, device="cuda", dtype=dtype)
            coat_kernels.dequantize_group(coat_kernels.quantize_group(x, fmt, 128, expand), dtype)


def steps() -> None:
    for dtype, m2_format in itertools.product((torch.float32, torch.bfloat16), ("e4m3", "log8")):
        # one flat buffer and views into it at odd offsets: parameters whose address is aligned to the element only
        flat = torch.rand(sum(SIZES) + 1, device="cuda", dtype=dtype)
        params = [torch.nn.Parameter(part) for part in flat[1:].split(SIZES)]
        adamw = FP8AdamW(params, min_quant_numel=0, fp8_config=FP8QuantizationConfig(m2_format=m2_format))
        for _ in range(2):
            for p in params:
                p.grad = torch.rand_like(p)
            adamw.step()


def main() -> None:
    # read at the first allocation: out of torch's pool an overrun would land in memory that is allocated, and pass
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    quantizers()
    steps()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
