"""Products of FP8 codes against the product of their decoded values in float64."""

from __future__ import annotations

import pytest
import torch

from coat_kernels import CoatWarning
from coat_kernels.ops import fp8_gemm
from coat_kernels.ops.fp8_gemm import fp8_matmul, gemm_mode, say_storage

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
#: Half a unit in the last place of the result's dtype, relative.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
ONE = torch.tensor(1.0)


def codes(rows: int, columns: int, fmt: str, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(FLOAT8[fmt]).view(torch.uint8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (16, 32, 48), (33, 17, 130)], ids=str)
@pytest.mark.parametrize("formats", [("e4m3", "e4m3"), ("e5m2", "e4m3")], ids=str)
@pytest.mark.parametrize("scales", ["number", "row", "row and number"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_equals_the_product_of_decoded_values(shape, formats, scales, dtype):
    m, n, k = shape
    a, b = codes(m, k, formats[0], 1), codes(n, k, formats[1], 2)
    generator = torch.Generator().manual_seed(3)
    scale_a = torch.rand(m, 1, generator=generator) + 0.5 if scales != "number" else torch.tensor(0.75)
    scale_b = torch.rand(n, 1, generator=generator) + 0.5 if scales == "row" else torch.tensor(1.25)
    left, right = (x.view(FLOAT8[fmt]).double() * s for x, fmt, s in ((a, formats[0], scale_a), (b, formats[1], scale_b)))
    magnitude = left.abs() @ right.abs().T
    for bias in (None, torch.randn(n, generator=generator)):
        out = fp8_matmul(a, scale_a, b, scale_b, bias, dtype, a_fmt=formats[0], b_fmt=formats[1])
        want = left @ right.T + (0 if bias is None else bias.double())
        assert out.dtype == dtype
        assert out.shape == (m, n)
        # k + 2 float32 additions and multiplications; the product, the bias and their sum are rounded to dtype
        size = magnitude + (0 if bias is None else bias.abs().double())
        assert ((out.double() - want).abs() <= size * ((k + 2) * 2.0**-24 + 3 * ROUNDING[dtype]) + 1e-12).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty(shape):
    m, n, k = shape
    out = fp8_matmul(codes(m, k, "e4m3", 1), ONE, codes(n, k, "e4m3", 2), ONE, torch.ones(n))
    assert out.equal(torch.ones(m, n, dtype=torch.bfloat16))


def test_compiles_in_full():
    a, b = codes(5, 7, "e4m3", 1), codes(3, 7, "e4m3", 2)
    compiled = torch.compile(fp8_matmul, fullgraph=True, backend="aot_eager")
    assert compiled(a, ONE, b, ONE).equal(fp8_matmul(a, ONE, b, ONE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": codes(2, 5, "e4m3", 1)}, "as many columns"),
        ({"a": torch.zeros(2, 4)}, "a must be uint8 codes with two dimensions"),
        ({"b": codes(2, 4, "e4m3", 1)[None]}, "b must be uint8 codes with two dimensions"),
        ({"scale_a": torch.ones(3, 1)}, r"scale_a must be float32, one number or one a row of a, \(2, 1\)"),
        ({"scale_b": torch.ones((), dtype=torch.float64)}, "scale_b must be float32"),
        ({"a_fmt": "int8"}, "a_fmt 'int8' has no FP8 product"),
    ],
)
def test_bad_arguments(change, message):
    good = {"a": codes(2, 4, "e4m3", 1), "scale_a": ONE, "b": codes(3, 4, "e4m3", 2), "scale_b": ONE}
    with pytest.raises(ValueError, match=message):
        fp8_matmul(**(good | change))


def test_cpus_store_fp8_and_gpus_without_it_say_so_once(monkeypatch):
    assert gemm_mode(torch.device("cpu")) == "storage"
    gpu = torch.device("cuda", 7)
    for capability, mode in (((8, 6), "storage"), ((8, 9), "fp8"), ((9, 0), "fp8"), ((12, 0), "fp8")):
        properties = type("Properties", (), {"major": capability[0], "minor": capability[1]})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert gemm_mode(gpu) == mode
    monkeypatch.setattr(fp8_gemm, "gemm_mode", lambda device: "storage")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce RTX 3090")
    say_storage.cache_clear()
    with pytest.warns(CoatWarning, match="GeForce RTX 3090 has no FP8 tensor cores"):
        say_storage(gpu)
    say_storage(gpu)  # a second warning would be an error here
    say_storage.cache_clear()
