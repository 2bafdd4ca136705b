"""Kernels of activations in 8 bits compile for every supported GPU, spill nothing and move 16 bytes at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from coat_kernels.formats.scaled8 import FORMAT_INDEX, SCALED_FORMATS  # noqa: E402
from coat_kernels.ops.activation_quant import triton as kernel  # noqa: E402
from tests.triton.compiling import Case, compile_kernel, pairs, registers  # noqa: E402

TYPES = {"codes_ptr": "*u8", "row": "i64:16", "groups": "i32", "tiles": "i32"}


def case(name: str, fmt: str, dtype: str, **constants: Any) -> Case:
    shape = {"G": 128, "R": 16, "WHOLE": True, "FMT": FORMAT_INDEX[fmt], **constants}
    row = {} if shape["WHOLE"] else {"row": "i64"}  # tails may be of any length
    return Case(getattr(kernel, f"{name}_kernel"), kernel._NUM_WARPS, shape, {**TYPES, **row, "x_ptr": dtype, "out_ptr": dtype})


def quantize(fmt: str, dtype: str = "*bf16", **constants: Any) -> Case:
    return case("quantize", fmt, dtype, **constants)


def dequantize(fmt: str, dtype: str = "*bf16", **constants: Any) -> Case:
    return case("dequantize", fmt, dtype, DTYPE={"*bf16": tl.bfloat16, "*fp16": tl.float16, "*fp32": tl.float32}[dtype], **constants)


MAIN = {f"quantize-{fmt}": quantize(fmt) for fmt in SCALED_FORMATS} | {f"dequantize-{fmt}": dequantize(fmt) for fmt in SCALED_FORMATS}
MORE = {
    "quantize-fp32": quantize("e4m3", "*fp32"),
    "quantize-rows-with-tails": quantize("auto", "*fp16", G=16, R=128, WHOLE=False),
    "quantize-wide-groups": quantize("int8", "*bf16", G=256, R=8),
    "dequantize-fp32": dequantize("auto", "*fp32", G=64, R=32),
    "dequantize-rows-with-tails": dequantize("e5m2", "*fp16", WHOLE=False),
}


@pytest.mark.parametrize("sm, case", pairs(MAIN, MORE))
def test_compiles_without_spills(sm: int, case: Case, tmp_path: Path) -> None:
    registers(compile_kernel(case, sm), tmp_path)


@pytest.mark.parametrize("fmt", SCALED_FORMATS)
@pytest.mark.parametrize("sm", [80, 90])
def test_whole_groups_move_16_bytes_at_a_time(fmt: str, sm: int) -> None:
    """32 elements a thread: two bytes each are four accesses, one byte each two."""
    for chosen, loads, stores in ((quantize(fmt), 4, 2), (dequantize(fmt), 2, 4)):
        ptx = compile_kernel(chosen, sm).asm["ptx"]
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == loads
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == stores


def test_maxima_take_the_number_beside_a_nan() -> None:
    assert "max.NaN" not in compile_kernel(quantize("e4m3"), 90).asm["ptx"]
