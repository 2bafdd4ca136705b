"""Kernels of two-stage group scaling compile for every supported GPU, spill nothing and move 16 bytes at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from coat_kernels.formats.scaled8 import FORMAT_INDEX, SINGLE_FORMATS  # noqa: E402
from coat_kernels.ops.tensor_quant import triton as kernel  # noqa: E402
from tests.triton.compiling import Case, compile_kernel, pairs, registers  # noqa: E402

TYPES = {"codes_ptr": "*u8", "row": "i64:16", "groups": "i32", "tiles": "i32", "count": "i32"}
TILE = {"TILE": kernel._TILE}


def case(name: str, dtype: str, constants: dict[str, Any]) -> Case:
    return Case(getattr(kernel, f"{name}_kernel"), kernel._NUM_WARPS, constants, {**TYPES, "x_ptr": dtype, "out_ptr": dtype})


def group_amax(dtype: str = "*bf16", **constants: Any) -> Case:
    return case("group_amax", dtype, {"G": 128, "R": 16, "WHOLE": True, **constants})


def quantize(fmt: str, dtype: str = "*bf16") -> Case:
    return case("quantize", dtype, {**TILE, "FMT": FORMAT_INDEX[fmt], "CHUNK": kernel._CHUNK})


def dequantize(fmt: str, dtype: str, tl_dtype: Any) -> Case:
    return case("dequantize", dtype, {**TILE, "FMT": FORMAT_INDEX[fmt], "DTYPE": tl_dtype})


TRANSPOSE = Case(
    kernel.transpose_kernel, 4, {"SIDE": 64}, {"codes_ptr": "*u8", "out_ptr": "*u8", "rows": "i32:16", "columns": "i32:16", "across": "i32"}
)
MAIN = {f"quantize-{fmt}": quantize(fmt) for fmt in SINGLE_FORMATS} | {
    "group_amax": group_amax(),
    "partial": Case(kernel.partial_kernel, kernel._NUM_WARPS, {"CHUNK": 8 * kernel._CHUNK}, TYPES),
    "dequantize-e4m3": dequantize("e4m3", "*bf16", tl.bfloat16),
    "transpose": TRANSPOSE,
}
MORE = {
    "group_amax-rows-with-tails": group_amax("*fp32", G=16, R=128, WHOLE=False),
    "quantize-fp32": quantize("e5m2", "*fp32"),
    "dequantize-fp32": dequantize("e5m2", "*fp32", tl.float32),
    "dequantize-int8": dequantize("int8", "*fp16", tl.float16),
}


@pytest.mark.parametrize("sm, case", pairs(MAIN, MORE))
def test_compiles_without_spills(sm: int, case: Case, tmp_path: Path) -> None:
    registers(compile_kernel(case, sm), tmp_path)


def test_tiles_move_16_bytes_at_a_time() -> None:
    """32 elements a thread of two bytes and of one."""
    for chosen, loads, stores in ((quantize("e4m3"), 4, 2), (group_amax(), 4, 0), (dequantize("e4m3", "*bf16", tl.bfloat16), 2, 4)):
        ptx = compile_kernel(chosen, 90).asm["ptx"]
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == loads
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == stores
