"""A short script for compute-sanitizer: every kernel once, on sizes that end inside a group and inside a tile.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.sanitize
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import torch

import coat_kernels
import coat_kernels.autograd.activation  # registers the ops
from coat_kernels.autograd.gated_residual import gated_residual
from coat_kernels.autograd.norm import layer_norm_modulate, rms_norm
from coat_kernels.autograd.norm_rope import norm_rope
from coat_kernels.optim import AdamW8bit, CAME8bit, FP8AdamW, FP8QuantizationConfig, Lion8bit

SIZES = (0, 1, 127, 128, 129, 511, 513, 3072, 4097)


def quantizers() -> None:
    for dtype, (fmt, expand) in itertools.product(
        (torch.float32, torch.bfloat16), (("e4m3", True), ("e4m3", False), ("e5m2", True), ("log8", True))
    ):
        for size in SIZES:
            x = torch.rand(size, device="cuda", dtype=dtype)
            coat_kernels.dequantize_group(coat_kernels.quantize_group(x, fmt, 128, expand), dtype)
    for dtype, block_size, size in itertools.product((torch.float32, torch.bfloat16), (64, 256, 4096), SIZES):
        x = torch.rand(size + 1, device="cuda", dtype=dtype)[1:]
        coat_kernels.dequantize_blockwise(coat_kernels.quantize_blockwise(x, block_size, signed=size % 2 == 0), dtype)


def activations() -> None:
    for dtype, group_size, fmt, (rows, row) in itertools.product(
        (torch.float32, torch.bfloat16), (16, 128, 256), ("e4m3", "e5m2", "int8", "auto"), ((0, 5), (1, 1), (3, 1001), (7, 384), (2, 4097))
    ):
        # at an address that is aligned to the element only
        x = torch.rand(rows * row + 1, device="cuda", dtype=dtype)[1:].view(rows, row)
        coat_kernels.dequantize_activation(coat_kernels.quantize_activation(x, fmt, group_size), dtype)
        if fmt != "auto":
            for per_row in (False, True):
                q = coat_kernels.quantize_tensor(x, fmt, group_size, per_row=per_row)
                coat_kernels.dequantize_tensor(q, dtype)
            torch.ops.coat_kernels.transpose_codes(q.codes)


def functions() -> None:
    """Activation functions, plain and gated: halves of one tensor at an odd offset, the maxima of the output, and the codes read back."""
    ops = torch.ops.coat_kernels
    for dtype, width, fmt in itertools.product((torch.float32, torch.bfloat16), (1, 384, 1001), ("e4m3", "auto")):
        packed = torch.rand(5 * 2 * width + 1, device="cuda", dtype=dtype)[1:].view(5, 2 * width)
        gate, up = packed.chunk(2, dim=-1)
        for kind in ("gelu_tanh", "gelu", "silu"):
            y, codes, scale, _ = ops.activation(gate.contiguous(), kind, fmt, 128, True)
            ops.activation_from_codes(codes, scale, kind, fmt, 128, dtype)
            ops.activation_backward(y, codes, scale, kind, fmt, 128)
            y, *saved, _ = ops.gated_activation(gate, up, kind, fmt, 128, True)
            ops.gated_activation_from_codes(*saved, kind, fmt, 128, dtype)
            ops.gated_activation_backward(y, *saved, kind, fmt, 128, False)


def norms() -> None:
    for dtype, (group_size, fmt), (rows, row) in itertools.product(
        (torch.float32, torch.bfloat16),
        ((16, "auto"), (128, "e4m3"), (256, "none")),
        ((1, 1), (3, 1001), (600, 384), (2, 4097), (2, 16384)),
    ):
        x = torch.rand(2 * rows * row + 1, device="cuda", dtype=dtype)[1:].view(2, rows, row).requires_grad_()
        factor = torch.rand(2 * row + 1, device="cuda", dtype=dtype)[1:].view(2, row).requires_grad_()
        kept = {"fmt": fmt, "group_size": group_size}
        y = layer_norm_modulate(x, factor, factor, **kept) + rms_norm(x, factor.detach()[0], **kept)
        gated_residual(x, y, factor, **kept).sum().backward()
    for dtype, interleaved, (heads, head_dim) in itertools.product(
        (torch.float32, torch.bfloat16), (True, False), ((1, 8), (11, 96), (24, 128))
    ):
        x = torch.rand(2 * 7 * heads * head_dim + 1, device="cuda", dtype=dtype)[1:].view(2, 7, heads, head_dim).requires_grad_()
        weight = torch.rand(head_dim, device="cuda").add_(0.5).requires_grad_()
        table = torch.rand(7, head_dim, device="cuda").add_(0.5)
        norm_rope(x, weight, table, table, first_weight=weight, first_tokens=3, interleaved=interleaved).sum().backward()


def steps() -> None:
    log8 = FP8QuantizationConfig(m2_format="log8")
    optimizers: tuple[Callable[..., torch.optim.Optimizer], ...] = (
        lambda params: FP8AdamW(params, min_quant_numel=0),
        lambda params: FP8AdamW(params, min_quant_numel=0, fp8_config=log8),
        lambda params: AdamW8bit(params, min_quant_numel=0),
        lambda params: AdamW8bit(params, min_quant_numel=1 << 20),
        lambda params: Lion8bit(params, min_quant_numel=0, block_size=2048),
        lambda params: CAME8bit(params),
    )
    for dtype, make in itertools.product((torch.float32, torch.bfloat16), optimizers):
        # one flat buffer and views into it at odd offsets: parameters whose address is aligned to the element only
        flat = torch.rand(sum(SIZES) + 1, device="cuda", dtype=dtype)
        params = [torch.nn.Parameter(part) for part in flat[1:].split(SIZES)]
        optimizer = make(params)
        for _ in range(2):
            for p in params:
                p.grad = torch.rand_like(p)
            optimizer.step()


def main() -> None:
    # read at the first allocation: out of torch's pool an overrun would land in memory that is allocated, and pass
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    quantizers()
    activations()
    functions()
    norms()
    steps()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
