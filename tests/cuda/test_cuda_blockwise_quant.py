"""Blockwise quantize and dequantize in CUDA, emulated: codes, absmax and values equal to the reference's, bit for bit."""

from __future__ import annotations

import ctypes

import pytest
import torch

from coat_kernels.formats.dynamic8 import BLOCK_SIZES, decode_blocks, encode_blocks, qmap, thresholds
from coat_kernels.ops.blockwise_quant import cuda

pytestmark = pytest.mark.usefixtures("emulator")
SIZES = (1, 7, 8, 63, 64, 257, 4096, 4097, 13001)


def awkward(n: int, signed: bool) -> torch.Tensor:
    """Heavy-tailed values of many scales, with zeros, subnormals and what is not finite among them."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(6).exp()
    x[::5] = 0
    for i, value in enumerate((torch.nan, torch.inf, 1e-44, -torch.inf, 3.4e38, -0.0)):
        x[11 * i + 3 :: 997] = value
    return x if signed else torch.where(x.isnan(), x, x.abs())


def assert_same(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    for name, g, w in zip(("codes", "absmax"), got, want, strict=True):
        assert torch.equal(g, w), f"{name}: {int((g != w).sum())} of {g.numel()} differ, first at {int((g != w).flatten().nonzero()[0])}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_maxima_are_the_references(dtype: torch.dtype, signed: bool) -> None:
    for n in SIZES:
        x = awkward(n, signed).to(dtype)
        for block_size in BLOCK_SIZES if n == SIZES[-1] else (64, 256, 4096):
            codes, absmax = cuda.quantize_blockwise(x, block_size=block_size, signed=signed)
            assert_same((codes, absmax), encode_blocks(x, block_size, signed=signed))
            back = cuda.dequantize_blockwise(codes, absmax, block_size=block_size, signed=signed, dtype=dtype)
            assert torch.equal(back, decode_blocks(codes, absmax, block_size, signed=signed).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addresses_aligned_to_their_elements_only(dtype: torch.dtype) -> None:
    whole = awkward(9001, True).to(dtype)
    for offset in range(1, 5):
        x = whole[offset:].view(-1)
        got = cuda.quantize_blockwise(x, block_size=256, signed=True)
        assert_same(got, encode_blocks(x, 256, signed=True))


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-130, 2.0**-70, 2.0**-63, 1.0, 2.0**119, 2.0**127])
def test_every_scale_of_a_block(scale: float) -> None:
    """The division by a block's maximum is exact where the maximum is subnormal, and where its reciprocal would be."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(4096, generator=generator) * torch.randn(4096, generator=generator).mul(4).exp().clamp(max=1)) * scale
    assert_same(cuda.quantize_blockwise(x, block_size=512, signed=True), encode_blocks(x, 512, signed=True))
    assert_same(cuda.quantize_blockwise(x, block_size=512, signed=False), encode_blocks(x, 512, signed=False))


def test_all_boundaries_and_codes() -> None:
    for signed in (True, False):
        edges = thresholds(signed)
        x = torch.cat([edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(1.0)), qmap(signed), torch.ones(1)])
        x = torch.cat([x, -x]) if signed else x
        assert_same(cuda.quantize_blockwise(x, block_size=4096, signed=signed), encode_blocks(x, 4096, signed=signed))


def test_nothing_is_launched_for_nothing() -> None:
    codes, absmax = cuda.quantize_blockwise(torch.empty(0, 3), block_size=256, signed=True)
    assert codes.shape == (0, 3) and absmax.shape == (0,)
    assert cuda.dequantize_blockwise(codes, absmax, block_size=256, signed=True, dtype=torch.float16).shape == (0, 3)


def test_the_division_rounds_as_ieee_does(emulator: ctypes.CDLL) -> None:
    """Three million quotients, most of them as near to halfway between two float32 as quotients come."""
    generator = torch.Generator().manual_seed(2)
    absmax = torch.rand(1 << 20, generator=generator) + 1
    quotient = torch.rand(1 << 20, generator=generator)
    halves = (quotient.double() + 2.0**-24 * quotient.double().log2().floor().exp2()) * absmax.double()
    x = torch.cat([quotient * absmax, halves.float(), halves.float().nextafter(torch.tensor(2.0))]).clamp(max=1)
    absmax = absmax.repeat(3)
    z = torch.empty_like(x)
    emulator.emulate_divide(*(ctypes.c_void_p(t.data_ptr()) for t in (x, absmax, z)), ctypes.c_int64(len(x)))
    assert torch.equal(z, x / absmax)
