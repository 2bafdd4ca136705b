"""Blockwise quantize and dequantize in CUDA, emulated or on a GPU: codes, absmax and values are the reference's, bit for bit."""

from __future__ import annotations

import ctypes

import pytest
import torch

from coat_kernels.formats.dynamic8 import BLOCK_SIZES, decode_blocks, encode_blocks, qmap, thresholds
from coat_kernels.ops.blockwise_quant import cuda

SIZES = (1, 7, 8, 63, 64, 257, 4096, 4097, 13001)


def awkward(n: int, signed: bool) -> torch.Tensor:
    """Heavy-tailed values of many scales, with zeros, subnormals and what is not finite among them."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(6).exp()
    x[::5] = 0
    for i, value in enumerate((torch.nan, torch.inf, 1e-44, -torch.inf, 3.4e38, -0.0)):
        x[11 * i + 3 :: 997] = value
    return x if signed else torch.where(x.isnan(), x, x.abs())


def check(x: torch.Tensor, block_size: int, signed: bool, device: torch.device) -> None:
    """`x` quantized on the device against the reference, and back in its own dtype."""
    codes, absmax = (t.cpu() for t in cuda.quantize_blockwise(on(device, x), block_size=block_size, signed=signed))
    for name, got, want in zip(("codes", "absmax"), (codes, absmax), encode_blocks(x, block_size, signed=signed), strict=True):
        wrong = (got != want).flatten()
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {got.numel()} differ, first at {int(wrong.nonzero()[0])}"
    held = {"block_size": block_size, "signed": signed}
    back = cuda.dequantize_blockwise(codes.to(device), absmax.to(device), **held, dtype=x.dtype)
    assert torch.equal(back.cpu(), decode_blocks(codes, absmax, **held).to(x.dtype))


def on(device: torch.device, x: torch.Tensor) -> torch.Tensor:
    """`x` on the device at an address that is as little aligned as it is here."""
    offset = x.data_ptr() % 16 // x.element_size()
    whole = torch.empty(x.numel() + offset, dtype=x.dtype, device=device)
    whole[offset:] = x.flatten()
    return whole[offset:].view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_maxima_are_the_references(dtype: torch.dtype, signed: bool, device: torch.device) -> None:
    for n in SIZES:
        for block_size in BLOCK_SIZES if n == SIZES[-1] else (64, 256, 4096):
            check(awkward(n, signed).to(dtype), block_size, signed, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addresses_aligned_to_their_elements_only(dtype: torch.dtype, device: torch.device) -> None:
    whole = awkward(9001, True).to(dtype)
    for offset in range(1, 5):
        check(whole[offset:], 256, True, device)


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-130, 2.0**-70, 2.0**-63, 1.0, 2.0**119, 2.0**127])
def test_every_scale_of_a_block(scale: float, device: torch.device) -> None:
    """The division by a block's maximum is exact where the maximum is subnormal, and where its reciprocal would be."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(4096, generator=generator) * torch.randn(4096, generator=generator).mul(4).exp().clamp(max=1)) * scale
    check(x, 512, True, device)
    check(x, 512, False, device)


def test_all_boundaries_and_codes(device: torch.device) -> None:
    for signed in (True, False):
        edges = thresholds(signed)
        x = torch.cat([edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(1.0)), qmap(signed), torch.ones(1)])
        x = torch.cat([x, -x]) if signed else x
        check(x, 4096, signed, device)


def test_nothing_is_launched_for_nothing(device: torch.device) -> None:
    codes, absmax = cuda.quantize_blockwise(torch.empty(0, 3, device=device), block_size=256, signed=True)
    assert codes.shape == (0, 3) and absmax.shape == (0,)
    assert cuda.dequantize_blockwise(codes, absmax, block_size=256, signed=True, dtype=torch.float16).shape == (0, 3)


def test_the_division_is_exact(emulated: ctypes.CDLL) -> None:
    """Every pair of numbers whose quotient lies so near to halfway between two float32 that the kernels' shorter division could err."""
    tried = ctypes.c_int64()
    emulated.emulate_divisions.restype = ctypes.c_int64
    assert emulated.emulate_divisions(ctypes.byref(tried)) == 0
    assert tried.value > 17_000_000
