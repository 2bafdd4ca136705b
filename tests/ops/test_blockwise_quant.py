"""Blockwise quantize and dequantize as ops: every backend equal to the reference bit for bit, schema, public wrappers, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from coat_kernels import dequantize_blockwise, quantize_blockwise
from coat_kernels.formats.dynamic8 import BLOCK_SIZES, decode_blocks, encode_blocks, qmap, thresholds
from coat_kernels.formats.parameters import PARAM_DTYPES

both_maps = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
every_dtype = pytest.mark.parametrize("dtype", PARAM_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
quantize, dequantize = torch.ops.coat_kernels.quantize_blockwise, torch.ops.coat_kernels.dequantize_blockwise


def sample(numel: int, signed: bool = True, seed: int = 0) -> Tensor:
    """Heavy-tailed values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * torch.exp(2 * torch.randn(numel, generator=generator))
    return x if signed else x.abs()


def check(x: Tensor, block_size: int, signed: bool, device: torch.device) -> None:
    codes, absmax = quantize(x.to(device), block_size, signed)
    want_codes, want_absmax = encode_blocks(x, block_size, signed=signed)
    assert torch.equal(absmax.cpu(), want_absmax)
    assert torch.equal(codes.cpu(), want_codes)
    for dtype in PARAM_DTYPES:
        got = dequantize(codes, absmax, block_size, signed, dtype)
        assert torch.equal(got.cpu(), decode_blocks(want_codes, want_absmax, block_size, signed=signed).to(dtype))


@both_maps
@every_dtype
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_equals_the_reference(signed: bool, dtype: torch.dtype, block_size: int, machine: torch.device) -> None:
    for numel in (0, 1, 3, 63, 64, 65, block_size - 1, block_size, block_size + 1, 3 * block_size + 77):
        check(sample(numel, signed).clamp(-6e4, 6e4).to(dtype), block_size, signed, machine)


@both_maps
def test_at_every_threshold(signed: bool, machine: torch.device) -> None:
    edges = thresholds(signed)
    z = torch.cat([torch.ones(1), edges, torch.nextafter(edges, torch.tensor(0.0)), torch.nextafter(edges, torch.tensor(2.0)).clamp(max=1)])
    z = torch.cat([z, -z, qmap(signed)])
    for scale in (1.0, 2.0**-100, 2.0**100):  # powers of two: z comes back from x / absmax exactly
        check(z * scale, 4096, signed, machine)


@both_maps
def test_near_every_threshold(signed: bool, machine: torch.device) -> None:
    """Where a fast kernel must leave the choice to exact arithmetic: within 20 floats of a threshold, for maxima of any pattern."""
    generator = torch.Generator().manual_seed(3)
    maxima = torch.ldexp(1 + torch.rand(200, generator=generator), torch.randint(-110, 110, (200,), generator=generator))
    edges = thresholds(signed).view(torch.int32)[None, :] + torch.randint(-20, 21, (200, len(thresholds(signed))), generator=generator)
    z = edges.int().view(torch.float32).clamp(max=1)
    x = torch.zeros(200, 256)
    x[:, 0] = maxima
    x[:, 1 : 1 + min(z.shape[1], 255)] = (z * maxima[:, None])[:, :255].minimum(maxima[:, None])
    check(x, 256, signed, machine)
    check(-x, 256, signed, machine)


@both_maps
def test_every_code_decodes(signed: bool, machine: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=machine)
    for absmax in (0.0, 1e-45, 1e-30, 0.7, 3e38):
        got = dequantize(codes, torch.full((4,), absmax, device=machine), 64, signed, torch.float32)
        assert torch.equal(got.cpu(), qmap(signed) * torch.tensor(absmax))


@both_maps
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-22, 1e22, 1e34])
def test_extreme_blocks(signed: bool, scale: float, machine: torch.device) -> None:
    check(sample(4096, signed).clamp(-1e3, 1e3).double().mul(scale).float(), 256, signed, machine)


@both_maps
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_elements(signed: bool, bad: float, machine: torch.device) -> None:
    for position in (0, 1, 63, 64, 255, 256, 299):
        x = sample(300, signed)
        x[position] = bad
        check(x, 256, signed, machine)
    check(torch.full((100,), bad), 64, signed, machine)
    check(torch.zeros(100), 64, signed, machine)


def test_negative_values_without_signs(machine: torch.device) -> None:
    check(sample(1000), 64, False, machine)


def test_threads_and_offsets_change_nothing() -> None:
    x = sample(400_001)
    whole = quantize_blockwise(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        split = quantize_blockwise(x)
        assert torch.equal(dequantize_blockwise(split), dequantize_blockwise(whole))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(split.codes, whole.codes)
    shifted = torch.empty(400_002)[1:].copy_(x)
    assert torch.equal(quantize_blockwise(shifted).codes, whole.codes)


def test_public_wrappers(device: torch.device) -> None:
    x = sample(5 * 300).view(5, 300).to(device).requires_grad_()
    q = quantize_blockwise(x.t())
    assert q.codes.shape == (300, 5)
    assert q.absmax.shape == (math.ceil(1500 / 256),)
    assert q.nbytes == 1500 + 4 * 6
    assert (q.block_size, q.signed) == (256, True)
    back = dequantize_blockwise(q, torch.bfloat16)
    assert back.dtype == torch.bfloat16
    # of the largest of a block: half of the widest step, 0.9 / 64 / 2, and bfloat16's rounding
    assert ((back.float() - x.t()).abs() <= 0.0071 * x.abs().max() + 2**-8 * x.t().abs()).all()


def test_opcheck(device: torch.device) -> None:
    x = sample(300).to(device)
    torch.library.opcheck(quantize.default, (x, 64, True))
    codes, absmax = quantize(x, 64, True)
    torch.library.opcheck(dequantize.default, (codes, absmax, 64, True, torch.float32))


def test_errors() -> None:
    x = torch.ones(300)
    with pytest.raises(ValueError, match="block size 100 is not offered; choose one of 64, 128"):
        quantize_blockwise(x, 100)
    with pytest.raises(TypeError, match="cannot quantize dtype torch.float64"):
        quantize_blockwise(x.double())
    codes, absmax = quantize(x, 64, True)
    with pytest.raises(ValueError, match=r"one entry a block, shape \(5,\) for 300 codes, got \(4,\)"):
        dequantize(codes, absmax[:4], 64, True)
    with pytest.raises(TypeError, match="codes must be torch.uint8, got torch.int8"):
        dequantize(codes.view(torch.int8), absmax, 64, True)
    with pytest.raises(TypeError, match="cannot dequantize to torch.int32"):
        dequantize(codes, absmax, 64, True, torch.int32)
    with pytest.raises(ValueError, match="codec 'dynamic8' scales blocks, not groups"):
        torch.ops.coat_kernels.quantize_group(x, "dynamic8")
