"""The ops `quantize_activation` and `dequantize_activation`: every backend bit for bit the reference, schemas, errors, bounds of peers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import coat_kernels
from coat_kernels.formats.scaled8 import ROW_GROUP_SIZES, SCALED_FORMATS, SINGLE_FORMATS, decode, encode

OPS = torch.ops.coat_kernels
every_format = pytest.mark.parametrize("fmt", SCALED_FORMATS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(*shape: int, width: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.exp(width * torch.randn(shape, generator=generator))).to(dtype)


def same(got: Tensor, want: Tensor) -> bool:
    got = got.cpu()
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def check(x: Tensor, machine: torch.device, fmt: str, group_size: int, dtype: torch.dtype = torch.float32) -> None:
    """There and back."""
    want, want_scale = encode(x, fmt, group_size)
    codes, scale = OPS.quantize_activation(x.to(machine), fmt, group_size)
    assert torch.equal(scale.cpu(), want_scale)
    assert torch.equal(codes.cpu(), want)
    back = OPS.dequantize_activation(codes, scale, fmt, group_size, dtype)
    assert back.dtype == dtype
    assert same(back, decode(want, want_scale, fmt, group_size, dtype))


@every_format
@pytest.mark.parametrize("group_size", ROW_GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(fmt: str, group_size: int, dtype: torch.dtype, machine: torch.device) -> None:
    for width in (0.0, 1.0, 3.0):
        check(sample(5, 1000, width=width, dtype=dtype), machine, fmt, group_size, dtype)
    check(sample(3, 4096, dtype=dtype), machine, fmt, group_size, dtype)


@every_format
@pytest.mark.parametrize("group_size", [16, 128])
def test_every_bfloat16(fmt: str, group_size: int, machine: torch.device) -> None:
    patterns = torch.arange(65536)
    shuffled = patterns[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    for order in (patterns, shuffled):
        x = torch.where(order >= 32768, order - 65536, order).to(torch.int16).view(torch.bfloat16)
        check(x.view(64, 1024), machine, fmt, group_size)


@every_format
def test_every_code(fmt: str, machine: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    scale = torch.tensor([[0.37], [2.0**-110], [1e30], [-0.37 if fmt == "auto" else 1.0]])
    for dtype in DTYPES:
        back = OPS.dequantize_activation(codes.to(machine), scale.to(machine), fmt, 256, dtype)
        assert same(back, decode(codes, scale, fmt, 256, dtype))


@every_format
@pytest.mark.parametrize("odd", [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-44, 3.4e38, -1e-30])
def test_one_odd_value_at_every_position(fmt: str, odd: float, machine: torch.device) -> None:
    for others in (sample(32).repeat(32, 1), torch.zeros(32, 32), torch.full((32, 32), odd)):
        check(others.fill_diagonal_(odd), machine, fmt, 32)


@every_format
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (0, 5), (2, 3, 5, 7), (1, 127), (4, 129), (2, 16)])
def test_shapes(fmt: str, shape: tuple[int, ...], machine: torch.device) -> None:
    check(sample(*shape), machine, fmt, 16)
    check(sample(*shape, dtype=torch.bfloat16), machine, fmt, 128)


@every_format
def test_threads_do_not_change_the_bytes(fmt: str) -> None:
    """Enough elements for two threads, in rows of a length that no piece of work divides."""
    x, threads = sample(300, 1001), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(x, torch.device("cpu"), fmt, 64)
    finally:
        torch.set_num_threads(threads)


@every_format
def test_opcheck(fmt: str, device: torch.device) -> None:
    x = sample(3, 200).to(device)
    torch.library.opcheck(OPS.quantize_activation.default, (x, fmt, 64))
    torch.library.opcheck(OPS.dequantize_activation.default, (*OPS.quantize_activation(x, fmt, 64), fmt, 64, torch.bfloat16))


@every_format
def test_float64_is_computed_in_float64(fmt: str) -> None:
    x = sample(9, 100).double()
    codes, scale = OPS.quantize_activation(x, fmt, 32)
    want, want_scale = encode(x, fmt, 32)
    assert scale.dtype == torch.float64 and torch.equal(scale, want_scale) and torch.equal(codes, want)
    torch.library.opcheck(OPS.quantize_activation.default, (x, fmt, 64))
    back = OPS.dequantize_activation(codes, scale, fmt, 32, torch.float64)
    assert same(back, decode(codes, scale, fmt, 32, torch.float64))


@every_format
def test_public_wrapper(fmt: str, device: torch.device) -> None:
    x = sample(10, 300).to(device)
    q = coat_kernels.quantize_activation(x, fmt, 64)
    assert q.nbytes == x.numel() + 4 * 10 * 5
    compiled = torch.compile(
        lambda t: coat_kernels.dequantize_activation(coat_kernels.quantize_activation(t, fmt, 64)), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(x), coat_kernels.dequantize_activation(q))
    transposed = coat_kernels.quantize_activation(x.t(), fmt, 64)
    assert torch.equal(transposed.codes, coat_kernels.quantize_activation(x.t().contiguous(), fmt, 64).codes)


#: Transformer Engine's tests/pytorch/utils.py `dtype_tols`: (rtol, atol) of a value that was cast to the format and back.
TRANSFORMER_ENGINE = {"e4m3": (0.125, 0.0675), "e5m2": (0.25, 0.125)}


@pytest.mark.parametrize("fmt", TRANSFORMER_ENGINE)
@pytest.mark.parametrize("shape", [(37,), (2, 13), (32, 1, 32), (256, 1024)])
def test_within_transformer_engines_tolerances_of_a_cast(fmt: str, shape: tuple[int, ...], machine: torch.device) -> None:
    """Their inputs too: uniform in [-1, 1]. e4m3 and e5m2 round by 2^-4 and 2^-3 of a value at most: half of their rtol."""
    x = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1
    rtol, atol = TRANSFORMER_ENGINE[fmt]
    for dtype in (torch.float32, torch.bfloat16):
        values = x.to(dtype)
        grouped = coat_kernels.dequantize_activation(coat_kernels.quantize_activation(values.to(machine), fmt), dtype)
        torch.testing.assert_close(grouped.cpu(), values, rtol=rtol, atol=atol)
        whole = coat_kernels.dequantize_tensor(coat_kernels.quantize_tensor(values.to(machine), fmt), dtype)
        torch.testing.assert_close(whole.cpu(), values, rtol=rtol, atol=atol)


#: torchao's test/float8/test_base.py asks for 25 dB of a cast to e4m3 and back; e5m2 has one mantissa bit less, 6 dB.
TORCHAO_DB = {"e4m3": 25.0, "e5m2": 19.0, "int8": 25.0, "auto": 25.0}


def sqnr(got: Tensor, want: Tensor) -> float:
    """Decibels, as torchao's `compute_error`."""
    return (20 * torch.log10(want.norm() / (want - got).norm())).item()


@every_format
@pytest.mark.parametrize("shape", [(16, 16), (2, 16, 16), (3, 2, 16, 16), (64, 4096)])
def test_above_torchaos_noise_ratio_of_a_cast(fmt: str, shape: tuple[int, ...], machine: torch.device) -> None:
    x = sample(*shape, width=0).to(machine)
    grouped = coat_kernels.dequantize_activation(coat_kernels.quantize_activation(x, fmt))
    assert sqnr(grouped, x) >= TORCHAO_DB[fmt]
    if fmt in SINGLE_FORMATS:
        for per_row in (False, True):
            assert sqnr(coat_kernels.dequantize_tensor(coat_kernels.quantize_tensor(x, fmt, per_row=per_row)), x) >= TORCHAO_DB[fmt]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: coat_kernels.quantize_activation(x, "fp8"),
            ValueError,
            "unknown activation format 'fp8'; known formats: e4m3, e5m2, int8",
        ),
        (lambda x: coat_kernels.quantize_activation(x, "none"), ValueError, "unknown activation format 'none'"),
        (lambda x: coat_kernels.quantize_activation(x, group_size=48), ValueError, "group size 48 is not offered"),
        (lambda x: coat_kernels.quantize_activation(x.long()), TypeError, "x has dtype torch.int64; pass float32"),
        (lambda x: coat_kernels.quantize_activation(x[0, 0]), ValueError, r"shape \(\) has none; pass x.view\(1\)"),
        (lambda x: OPS.dequantize_activation(x, x, "e4m3", 64, torch.float32), TypeError, "codes must be torch.uint8, got torch.float32"),
        (lambda x: OPS.dequantize_activation(x.byte(), x.half(), "e4m3", 64, torch.float32), TypeError, "scale must be torch.float32"),
        (
            lambda x: OPS.dequantize_activation(x.byte(), x, "e4m3", 64, torch.float32),
            ValueError,
            r"scale of shape \(4, 1\), got \(4, 64\)",
        ),
        (lambda x: OPS.dequantize_activation(x.byte(), x[:, :1], "e4m3", 64, torch.int8), TypeError, "the result has dtype torch.int8"),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(4, 64))


def test_native_refuses_unknown_numbers() -> None:
    from coat_kernels._native import native

    if native is None:
        pytest.skip("no C++ extension")
    settings = {"x": 0, "x_dtype": 0, "rows": 0, "row": 0, "codes": 0, "scale": 0, "threads": 1}
    with pytest.raises(ValueError, match="unknown activation format number 9"):
        native.quantize_activation(fmt=9, group_size=128, **settings)
    with pytest.raises(ValueError, match="group size 48 is not offered"):
        native.quantize_activation(fmt=1, group_size=48, **settings)
