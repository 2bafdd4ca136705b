"""Norms, norms with rotary embedding and gated residuals compile for every supported GPU, spill nothing and move 16 bytes at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from coat_kernels.formats.scaled8 import FORMAT_INDEX  # noqa: E402
from coat_kernels.ops import triton_rows  # noqa: E402
from coat_kernels.ops.gated_residual import triton as gated  # noqa: E402
from coat_kernels.ops.norm import triton as norm  # noqa: E402
from coat_kernels.ops.norm_rope import triton as rope  # noqa: E402
from tests.triton.compiling import Case, compile_kernel, pairs, registers  # noqa: E402

BF16 = {name: "*bf16" for name in ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "gain_ptr", "shift_ptr", "residual_ptr", "gate_ptr", "weight_ptr")}
BF16 |= {"first_weight_ptr": "*bf16"}
SIZES = {"codes_ptr": "*u8", "rows": "i32", "groups": "i32", "segment_rows": "i32", "run_rows": "i32", "block_rows": "i32"}
SIZES |= {name: "i32" for name in ("blocks", "heads", "tokens", "first_tokens", "table_tokens", "all_tokens", "block_tokens")}
FP32 = {name: "*fp32" for name in BF16}


def case(kernel: Any, num_warps: int, constants: dict[str, Any], absent: tuple[str, ...], dtypes: dict[str, str], row: int) -> Case:
    """`row` is specialized as a launch does: what is no multiple of 16 gives the compiler no alignment."""
    dtype = tl.bfloat16 if dtypes is BF16 else tl.float32
    missing = {name: None for name in absent}
    aligned = "i32:16" if row % 16 == 0 else "i32"
    return Case(kernel, num_warps, {"DTYPE": dtype, **constants, **missing}, {**SIZES, **dtypes, "row": aligned})


def norm_case(
    name: str,
    row: int,
    fmt: str = "e4m3",
    absent: tuple[str, ...] = (),
    group_size: int = 128,
    dtypes: dict[str, str] = BF16,
    center: bool = True,
) -> Case:
    sums = name == "norm_backward" and not {"dgain_ptr", "dshift_ptr"} <= set(absent)
    tiles = triton_rows.RowTiles(4608, row, group_size, per_thread=16 if sums else 32)
    constants = {**tiles.constants(), "PLUS_ONE": center, "FMT": FORMAT_INDEX[fmt]}
    if name != "norm_from_codes":
        constants["CENTER"] = center
    return case(getattr(norm, f"{name}_kernel"), tiles.num_warps, constants, absent, dtypes, row)


def rope_case(name: str, row: int, interleaved: bool = True, absent: tuple[str, ...] = (), dtypes: dict[str, str] = BF16) -> Case:
    _, constants, num_warps = rope.geometry(24, row, True, interleaved)
    return case(getattr(rope, f"{name}_kernel"), num_warps, constants, absent, dtypes, row)


def gated_case(name: str, fmt: str = "e4m3", absent: tuple[str, ...] = (), row: int = 3072, dtypes: dict[str, str] = BF16) -> Case:
    _, constants = gated.geometry(row, 128)
    return case(getattr(gated, f"{name}_kernel"), gated._NUM_WARPS, {**constants, "FMT": FORMAT_INDEX[fmt]}, absent, dtypes, row)


NO_SUMS = ("dgain_ptr", "dshift_ptr")
MAIN = {
    "modulate": norm_case("norm", 3072, absent=("amax_ptr",)),
    "modulate-backward-frozen": norm_case("norm_backward", 3072, absent=NO_SUMS),
    "rope": rope_case("norm_rope", 128),
    "gated": gated_case("gated_residual"),
}
MORE = {
    "modulate-backward": norm_case("norm_backward", 3072),
    "rms-backward": norm_case("norm_backward", 4096, absent=("dshift_ptr",), center=False),
    "rope-backward": rope_case("norm_rope_backward", 128),
    "gated-backward": gated_case("gated_residual_backward"),
    "layer-auto-amax-16384": norm_case("norm", 16384, "auto"),
    "layer-backward-frozen-16384": norm_case("norm_backward", 16384, "auto", absent=NO_SUMS),
    "layer-dgain-16384": norm_case("norm_backward", 16384, absent=("dx_ptr", "dshift_ptr")),
    "layer-backward-8192": norm_case("norm_backward", 8192, "auto", dtypes=FP32),
    "rms-heads-backward": norm_case("norm_backward", 128, absent=("dshift_ptr",), center=False),
    "layer-tail": norm_case("norm", 1001, "auto"),
    "rope-llama-backward": rope_case("norm_rope_backward", 128, False, absent=("first_weight_ptr",), dtypes=FP32),
    "gated-auto-tail": gated_case("gated_residual", "auto", row=1000),
    "add-blocks": Case(
        triton_rows.add_blocks_kernel, 4, {"LINES": triton_rows._LINES, "COLUMNS": triton_rows._COLUMNS}, {"blocks": "i32", "row": "i32"}
    ),
}


#: Long rows that are no multiple of 16 elements: masks element by element take more registers than there are.
SPILLING = {
    "layer-4104": norm_case("norm", 4104, "auto"),
    "layer-backward-4104": norm_case("norm_backward", 4104, "e5m2", group_size=16),
    "layer-frozen-16001": norm_case("norm_backward", 16001, absent=NO_SUMS),
}


@pytest.mark.parametrize("name", SPILLING)
def test_long_rows_of_odd_length_compile(name: str) -> None:
    compile_kernel(SPILLING[name], 90)


@pytest.mark.parametrize("sm, case", pairs(MAIN, MORE))
def test_compiles_without_spills(sm: int, case: Case, tmp_path: Path) -> None:
    registers(compile_kernel(case, sm), tmp_path)


@pytest.mark.parametrize(
    "name, loads, stores",
    [("modulate", 4, 4), ("modulate-backward-frozen", 4, 4), ("rope", 1, 1), ("gated", 4, 2), ("gated-backward", 2, 2)],
)
def test_rows_move_16_bytes_at_a_time(name: str, loads: int, stores: int) -> None:
    ptx = compile_kernel({**MAIN, **MORE}[name], 90).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= loads
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) >= stores
