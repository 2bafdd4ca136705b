"""Compiling Triton kernels for GPUs that are not there: what the files of compile tests share."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coat_kernels.formats.triton_ptx import PTX, PTX_FP8

TARGETS = (75, 80, 86, 89, 90, 100, 120)
#: For what users rarely run: the oldest target, the first with FP8 conversions and the newest.
FEW_TARGETS = (75, 89, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Case:
    """A launch.

    Args:
        kernel: the jitted function.
        num_warps: of a program.
        constants: values of constexpr arguments, by name, without `ISA`.
        types: of the other arguments, by name, as Triton writes them ("*bf16", "i32"); "i32:16" promises a multiple of 16. Those that
            are not named are float32 if their names do not end in `_ptr`, else pointers to float32.
    """

    kernel: Any
    num_warps: int
    constants: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)


def compile_kernel(case: Case, sm: int) -> Any:
    """Compile as a launch with 16-byte aligned pointers would."""
    names = case.kernel.arg_names
    constants = {**case.constants, "ISA": (PTX_FP8 if sm >= 89 else PTX).value} if "ISA" in names else case.constants
    default = {name: "*fp32" if name.endswith("_ptr") else "fp32" for name in names}
    types = {name: "constexpr" if name in constants else case.types.get(name, default[name]) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] == "*" or types[name].endswith(":16")}
    signature = {name: kind.removesuffix(":16") for name, kind in types.items()}
    source = ASTSource(case.kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    try:
        return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": case.num_warps})
    except (ValueError, RuntimeError, AssertionError) as error:
        if re.search(rf"sm_{sm}|capability|unsupported", str(error)):
            pytest.skip(f"this Triton does not know sm_{sm}: {error}")
        raise


def pairs(main: dict[str, Case], more: dict[str, Case]) -> list[Any]:
    """Parameters (sm, case): `main`, what runs unless a user asks otherwise, for every target, and `more` for a few."""
    chosen = [(sm, name, case) for sm in TARGETS for name, case in main.items()]
    chosen += [(sm, name, case) for sm in FEW_TARGETS for name, case in more.items()]
    return [pytest.param(sm, case, id=f"sm_{sm}-{name}") for sm, name, case in chosen]


def registers(compiled: Any, folder: Path) -> int:
    """Registers a thread of a compiled kernel; fails if it spills any."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    assert found, usage
    assert found[2] == "0" and found[3] == "0", f"spills registers: {usage}"
    return int(found[1])
