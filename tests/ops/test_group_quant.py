"""The ops `quantize_group` and `dequantize_group`: every backend against the reference, schemas, errors."""

from __future__ import annotations

import pytest
import torch

import coat_kernels
from coat_kernels.formats import CODECS, FORMATS, Codec
from coat_kernels.formats.reference import decode_group, encode_group
from tests.codes import places

QUANTIZED = [codec for codec in CODECS.values() if codec.quantized and not codec.blockwise]
codecs = pytest.mark.parametrize("codec", QUANTIZED, ids=lambda codec: codec.name)

#: Share of codes that may lie one step beside the reference's, where log2 and exp2 round differently (formats/README.md).
MAY_DIFFER = {"cpu": 2e-3, "cuda": 4e-3}


def sample(codec: Codec, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.exp(1.5 * torch.randn(shape, generator=generator))
    return (x if codec.signed else x.abs()).to(device, dtype)


def quantize(x: torch.Tensor, codec: Codec, group_size: int = 128, rounding: str = "nearest", key: int = 0) -> tuple[torch.Tensor, ...]:
    return torch.ops.coat_kernels.quantize_group(x, codec.name, group_size, codec.signed, rounding, key)


@codecs
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_the_reference(codec: Codec, group_size: int, dtype: torch.dtype, device: torch.device) -> None:
    x = sample(codec, (37, 1001), device, dtype)
    codes, amax, k16 = quantize(x, codec, group_size)
    want, want_amax, want_k16 = encode_group(x, codec, group_size, signed=codec.signed, dtype=torch.float64)
    assert torch.equal(amax, want_amax)
    assert torch.equal(k16, want_k16)
    difference = (places(codes, codec) - places(want, codec)).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= MAY_DIFFER[device.type]
    decoded = torch.ops.coat_kernels.dequantize_group(codes, amax, k16, codec.name, group_size, torch.float32, shape=x.shape)
    exact = decode_group(codes, amax, k16, codec, group_size, shape=x.shape, dtype=torch.float64)
    assert ((decoded - exact).abs() <= 4e-6 * exact.abs()).all()


@codecs
def test_stochastic_draws_are_the_references(codec: Codec, device: torch.device) -> None:
    x = sample(codec, (5000,), device)
    codes, _amax, _k16 = quantize(x, codec, rounding="stochastic", key=0xDEADBEEF)
    want, _, _ = encode_group(x, codec, 128, signed=codec.signed, rounding="stochastic", key=0xDEADBEEF, dtype=torch.float64)
    difference = (places(codes, codec) - places(want, codec)).abs()
    assert difference.max() <= 1
    # a draw is decided at 1/256ths: about as many inputs lie near a boundary as with nearest, and the probability itself rounds
    assert (difference > 0).float().mean() <= 4e-3
    other, _, _ = quantize(x, codec, rounding="stochastic", key=1)
    assert (other != codes).float().mean() > 0.1


@codecs
@pytest.mark.parametrize("shape", [(0,), (1,), (127,), (128,), (129,), (), (3, 0, 2), (2, 3, 5, 7)])
def test_shapes(codec: Codec, shape: tuple[int, ...], device: torch.device) -> None:
    x = sample(codec, shape, device)
    codes, amax, k16 = quantize(x, codec)
    _want, want_amax, want_k16 = encode_group(x, codec, 128, signed=codec.signed)
    assert codes.shape == codec.codes_shape(x.shape)
    assert torch.equal(amax, want_amax)
    assert torch.equal(k16, want_k16)
    decoded = torch.ops.coat_kernels.dequantize_group(codes, amax, k16, codec.name, 128, torch.bfloat16, shape=shape)
    assert decoded.shape == x.shape
    assert decoded.dtype == torch.bfloat16


@codecs
def test_non_contiguous_input_is_read_in_row_major_order(codec: Codec, device: torch.device) -> None:
    x = sample(codec, (48, 100), device)
    for got, want in zip(quantize(x.t(), codec), quantize(x.t().contiguous(), codec), strict=True):
        assert torch.equal(got, want)


@codecs
def test_opcheck(codec: Codec, device: torch.device) -> None:
    x = sample(codec, (3, 200), device)
    torch.library.opcheck(torch.ops.coat_kernels.quantize_group.default, (x, codec.name, 64, codec.signed))
    stored = (*quantize(x, codec, 64), codec.name, 64, torch.float16)
    torch.library.opcheck(torch.ops.coat_kernels.dequantize_group.default, stored)
    torch.library.opcheck(torch.ops.coat_kernels.dequantize_group.default, stored, {"shape": list(x.shape)})


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("expand", [True, False])
def test_public_wrapper_roundtrip(fmt: str, expand: bool, device: torch.device) -> None:
    x = torch.rand(10, 300, device=device) + 0.5
    quantized = coat_kernels.quantize_group(x, fmt, 64, expand)
    assert quantized.nbytes == (x.numel() // 2 if fmt == "e2m1" else x.numel()) + 5 * -(-x.numel() // 64)
    error = (coat_kernels.dequantize_group(quantized) - x).abs() / x
    assert error.max() < (0.26 if fmt == "e2m1" else 0.13)  # half a step of e5m2, of e2m1, without expansion
    compiled = torch.compile(lambda t: coat_kernels.dequantize_group(coat_kernels.quantize_group(t, fmt, 64, expand)), backend="eager")
    assert torch.equal(compiled(x), coat_kernels.dequantize_group(quantized))


def test_expansion_narrows_the_error() -> None:
    x = torch.rand(1 << 14) + 0.5
    errors = [
        (coat_kernels.dequantize_group(coat_kernels.quantize_group(x, expand=expand)) - x).square().mean() for expand in (True, False)
    ]
    assert errors[0] < errors[1] / 20


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: coat_kernels.quantize_group(x, "int8"), ValueError, "unknown format 'int8'; known formats: e4m3, e5m2, log8"),
        (lambda x: coat_kernels.quantize_group(x, group_size=48), ValueError, "group size 48 is not offered"),
        (lambda x: coat_kernels.quantize_group(x, rounding="up"), ValueError, "unknown rounding 'up'"),
        (lambda x: coat_kernels.quantize_group(x.double()), TypeError, "cannot quantize dtype torch.float64"),
        (lambda x: coat_kernels.quantize_group(-x, "log8"), ValueError, "log8 holds non-negative values only, got a minimum of -1"),
        (lambda x: coat_kernels.quantize_group(x, "log8", signed=True), ValueError, "holds no signs"),
        (lambda x: torch.ops.coat_kernels.quantize_group(x, "float32"), ValueError, "nothing to quantize"),
        (
            lambda x: coat_kernels.dequantize_group(coat_kernels.quantize_group(x), torch.float64),
            TypeError,
            "cannot dequantize to torch.float64",
        ),
        (
            lambda x: torch.ops.coat_kernels.dequantize_group(*quantize(x, CODECS["e2m1"]), "e2m1", shape=[2, 120]),
            ValueError,
            r"a tensor of shape \(2, 120\) has 120 bytes of codes, got 128",
        ),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(256))


def test_metadata_of_another_shape_is_refused() -> None:
    codes, amax, k16 = quantize(torch.ones(256), CODECS["e4m3_expand"])
    with pytest.raises(ValueError, match=r"amax must have one entry a group, shape \(2,\) for 256 codes, got \(1,\)"):
        torch.ops.coat_kernels.dequantize_group(codes, amax[:1], k16, "e4m3_expand")
    with pytest.raises(TypeError, match="k16 must be torch.uint8, got torch.int64"):
        torch.ops.coat_kernels.dequantize_group(codes, amax, k16.long(), "e4m3_expand")


def test_a_device_without_kernels_is_refused() -> None:
    from coat_kernels.backends import BackendUnavailable, require_backend

    with pytest.raises(BackendUnavailable, match="group_quant has no kernel for device 'mps'"):
        require_backend("group_quant", torch.device("mps"))
