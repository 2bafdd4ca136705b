"""Every kernel compiles for every supported GPU on a machine that has none, and spills no registers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from coat_kernels.formats.codecs import CODECS  # noqa: E402
from coat_kernels.ops.adamw_fp8 import triton as adamw_fp8  # noqa: E402
from coat_kernels.ops.group_quant import triton as group_quant  # noqa: E402
from tests.triton.compiling import Case, compile_kernel, pairs, registers  # noqa: E402

TYPES = {"codes_ptr": "*u8", "k16_ptr": "*u8", "table_ptr": "*i64", "tiles_ptr": "*i32"}
TYPES |= {"n": "i64", "key": "i32", "n_rows": "i32", "seed": "i32"}


def step_case(m: str, v: str, param: Any, grad: Any, **constants: Any) -> Case:
    defaults = {"M_STOCHASTIC": False, "V_STOCHASTIC": False, "PARAM_ROUNDING": 0, "MAXIMIZE": False, "G": 128}
    scaler = {"grad_scale_ptr": None, "found_inf_ptr": None} if not constants.pop("amp", False) else {}
    chosen = {"M_CODEC": CODECS[m].index, "V_CODEC": CODECS[v].index, "PARAM_DTYPE": param, "GRAD_DTYPE": grad}
    return Case(adamw_fp8.step_kernel, 1, {**defaults, **scaler, **chosen, **constants}, TYPES)


def quantize_case(codec: str, x: str, **constants: Any) -> Case:
    shape = {"G": 128, "ROWS": 16, "CODEC": CODECS[codec].index, "STOCHASTIC": False, "SIGNED": CODECS[codec].signed}
    return Case(group_quant.quantize_kernel, 4, {**shape, **constants}, {**TYPES, "x_ptr": x})


def dequantize_case(codec: str, out: str, dtype: Any) -> Case:
    constants = {"G": 128, "ROWS": 16, "CODEC": CODECS[codec].index, "DTYPE": dtype}
    return Case(group_quant.dequantize_kernel, 4, constants, {**TYPES, "out_ptr": out})


#: What runs unless a user asks otherwise; compiled for every target.
MAIN = {
    "step-fp32-e4m3": step_case("e4m3_expand", "e4m3_expand", tl.float32, tl.float32),
    "step-bf16-log8": step_case("e4m3_expand", "log8", tl.bfloat16, tl.bfloat16, V_STOCHASTIC=True),
    "advance": Case(adamw_fp8.advance_kernel, 1, {"LR_IS_TENSOR": False, "ROWS": 32, "found_inf_ptr": None}, TYPES),
    "quantize-e4m3": quantize_case("e4m3_expand", "*fp32"),
    "dequantize-e4m3": dequantize_case("e4m3_expand", "*fp32", tl.float32),
}
#: The other combinations; compiled for the oldest target, for the first with FP8 conversions and for the newest.
MORE = {
    "step-bf16-e4m3": step_case("e4m3_expand", "e4m3_expand", tl.bfloat16, tl.bfloat16, amp=True),
    "step-fp32-log8": step_case("e4m3_expand", "log8", tl.float32, tl.bfloat16, G=256),
    "step-split": step_case("e4m3_expand", "log8", tl.bfloat16, tl.bfloat16, PARAM_ROUNDING=2, G=64),
    "step-fp16-stochastic": step_case("e5m2_expand", "e4m3", tl.float16, tl.float16, M_STOCHASTIC=True, PARAM_ROUNDING=1, MAXIMIZE=True),
    "step-fp32-states": step_case("float32", "float32", tl.float32, tl.float32, G=32, amp=True),
    "step-mixed": step_case("float32", "e5m2_expand", tl.bfloat16, tl.float32, PARAM_ROUNDING=1, V_STOCHASTIC=True),
    "step-softsign8": step_case("softsign8", "log8", tl.bfloat16, tl.bfloat16, V_STOCHASTIC=True),
    "step-softsign8-stochastic": step_case("softsign8", "log8", tl.float32, tl.float32, M_STOCHASTIC=True, V_STOCHASTIC=True),
    "step-e2m1": step_case("e2m1_expand", "e2m1_expand", tl.float32, tl.float32),
    "step-e2m1-stochastic": step_case("e2m1", "e2m1_expand", tl.bfloat16, tl.bfloat16, M_STOCHASTIC=True, V_STOCHASTIC=True, G=32),
    "step-bf16-states": step_case("bfloat16", "bfloat16", tl.bfloat16, tl.bfloat16, V_STOCHASTIC=True),
    "advance-tensor-lr": Case(adamw_fp8.advance_kernel, 1, {"LR_IS_TENSOR": True, "ROWS": 32}, {**TYPES, "lr": "*fp32"}),
    "quantize-e5m2-stochastic": quantize_case("e5m2_expand", "*bf16", STOCHASTIC=True),
    "quantize-e4m3-unsigned": quantize_case("e4m3", "*fp16", SIGNED=False),
    "quantize-log8-stochastic": quantize_case("log8", "*fp32", STOCHASTIC=True),
    "quantize-softsign8-stochastic": quantize_case("softsign8", "*fp32", STOCHASTIC=True),
    "quantize-e2m1-stochastic": quantize_case("e2m1_expand", "*fp32", STOCHASTIC=True),
    "dequantize-softsign8": dequantize_case("softsign8", "*fp32", tl.float32),
    "dequantize-e2m1": dequantize_case("e2m1_expand", "*bf16", tl.bfloat16),
    "dequantize-log8": dequantize_case("log8", "*bf16", tl.bfloat16),
    "dequantize-e5m2": dequantize_case("e5m2", "*fp16", tl.float16),
}


@pytest.mark.parametrize("sm, case", pairs(MAIN, MORE))
def test_compiles_without_spills(sm: int, case: Case, tmp_path: Path) -> None:
    registers(compile_kernel(case, sm), tmp_path)


@pytest.mark.parametrize("name", ["step-fp32-e4m3", "step-bf16-log8"])
def test_whole_tiles_move_16_bytes_at_a_time(name: str) -> None:
    """16 elements a thread: one access for the codes of each moment, two or four for parameters and gradients."""
    compiled = compile_kernel(MAIN[name], 90)
    assert "sizePerThread = [1, 16], threadsPerWarp = [4, 8]" in compiled.asm["ttgir"]
    wide = 4 if "fp32" in name else 2
    assert len(re.findall(r"ld\.global\.v4\.b32", compiled.asm["ptx"])) == 2 + 2 * wide
    assert len(re.findall(r"st\.global\.v4\.b32", compiled.asm["ptx"])) == 2 + wide
