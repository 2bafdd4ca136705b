"""The activation functions' kernels compile for every supported GPU, spill nothing, move 16 bytes at a time and stay short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from coat_kernels.formats.scaled8 import FORMAT_INDEX  # noqa: E402
from coat_kernels.ops.activation import triton as kernel  # noqa: E402
from coat_kernels.ops.activation.kinds import KIND_INDEX, KINDS  # noqa: E402
from tests.triton.compiling import Case, compile_kernel, pairs, registers  # noqa: E402

DTYPES = {"*bf16": tl.bfloat16, "*fp16": tl.float16, "*fp32": tl.float32}
TYPES = {name: "i64:16" for name in ("gate_stride", "up_stride", "out_stride", "row")} | {"groups": "i32", "tiles": "i32"}
CODES = {name: "*u8" for name in ("gate_codes_ptr", "up_codes_ptr")}


def case(
    name: str, kind: str, fmt: str, dtype: str, *, gated: bool, flat: bool, whole: bool, from_codes: bool, amax: bool, group_size: int = 128
) -> Case:
    """A launch as `_launch` makes it; what there is not is None."""
    absent = [] if gated else ["up_ptr", "up_codes_ptr", "up_scale_ptr", "dup_ptr"]
    absent += ["gate_ptr", "up_ptr"] if from_codes else []
    absent += [] if amax else ["y_amax_ptr"]
    if fmt == "none":
        absent += ["gate_codes_ptr", "gate_scale_ptr", "up_codes_ptr", "up_scale_ptr"]
    jitted = getattr(kernel, f"{name}_kernel")
    constants: dict[str, Any] = {key: None for key in absent if key in jitted.arg_names}
    tile = kernel._TILE // (2 if gated else 1)
    constants |= {"KIND": KIND_INDEX[kind], "GATED": gated, "FMT": FORMAT_INDEX[fmt], "DTYPE": DTYPES[dtype]}
    constants |= {"G": group_size, "R": tile // group_size, "FLAT": flat, "WHOLE": whole}
    values = dict.fromkeys(("gate_ptr", "up_ptr", "y_ptr", "dy_ptr", "dgate_ptr", "dup_ptr"), dtype)
    return Case(jitted, kernel._NUM_WARPS, constants, {**TYPES, **CODES, **values})


def forward(kind: str, fmt: str = "e4m3", dtype: str = "*bf16", **options: Any) -> Case:
    return case("forward", kind, fmt, dtype, **{"gated": False, "flat": True, "whole": True, "from_codes": False, "amax": False, **options})


def backward(kind: str, fmt: str = "e4m3", dtype: str = "*bf16", **options: Any) -> Case:
    gated = options.get("gated", False)
    return case(
        "backward",
        kind,
        fmt,
        dtype,
        **{"gated": gated, "flat": not gated, "whole": True, "from_codes": fmt != "none", "amax": False, **options},
    )


MAIN = {f"forward-{kind}": forward(kind) for kind in KINDS} | {f"backward-{kind}": backward(kind) for kind in KINDS}
MAIN |= {"swiglu": forward("silu", gated=True), "swiglu-backward": backward("silu", gated=True)}
MAIN |= {"geglu-halves": forward("gelu", gated=True, flat=False), "geglu-backward": backward("gelu", gated=True)}
MORE = {
    "forward-none": forward("gelu", "none", "*fp16"),
    "forward-auto-amax": forward("gelu_tanh", "auto", amax=True),
    "forward-fp32-tails": forward("gelu", "auto", "*fp32", flat=False, whole=False, amax=True, group_size=256),
    "rebuild": forward("gelu_tanh", "auto", from_codes=True),
    "backward-none": backward("silu", "none", "*fp32"),
    "backward-int8": backward("gelu", "int8", "*fp16", group_size=16),
    "swiglu-auto-amax": forward("silu", "auto", gated=True, amax=True, flat=False, whole=False, group_size=32),
    "swiglu-rebuild": forward("silu", "e5m2", gated=True, from_codes=True),
    "geglu-backward-auto": backward("gelu_tanh", "auto", "*fp32", gated=True),
}


@pytest.mark.parametrize("sm, case", pairs(MAIN, MORE))
def test_compiles_without_spills(sm: int, case: Case, tmp_path: Path) -> None:
    registers(compile_kernel(case, sm), tmp_path)


@pytest.mark.parametrize("sm", [80, 90])
def test_accesses_of_16_bytes(sm: int) -> None:
    """2048 elements by 64 threads, 32 each: four accesses to 2-byte values, two to codes. Gated functions have half as many of each."""
    expected = {
        "forward-gelu": (4, 4 + 2),
        "backward-gelu": (4 + 2, 4),
        "swiglu": (2 + 2, 2 + 1 + 1),
        "geglu-halves": (2 + 2, 2 + 1 + 1),
        "swiglu-backward": (2 + 1 + 1, 2 + 2),
    }
    for name, (loads, stores) in expected.items():
        ptx = compile_kernel(MAIN[name], sm).asm["ptx"]
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == loads, name
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == stores, name
