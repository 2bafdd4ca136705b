"""These tests run in Triton's interpreter, which is chosen before triton is imported: `../test_interpreter.py` starts them."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PTX = os.environ.get("COAT_TEST_ISA") == "ptx"

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    # logarithms of zeros are part of the formats
    np.seterr(all="ignore")
    sys.path.insert(0, str(Path(__file__).parent.parent))

    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _with_loop_bounds(tensor, scope):  # type: ignore[no-untyped-def]
        """Triton 3.6 takes a loop's bound, an array of one element, for a Python scalar, which NumPy 2.4 no longer allows."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _with_loop_bounds

if INTERPRETED and PTX:
    import ptx_interpreter

    ptx_interpreter.install()


#: Ops whose launchers ask for the instruction set.
OPS = (
    "activation",
    "activation_quant",
    "adamw_fp8",
    "gated_residual",
    "group_quant",
    "norm",
    "norm_rope",
    "tensor_quant",
)


@pytest.fixture(autouse=True)
def _interpretable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take the assembly that sm_89 and later run, or the portable operations; a program's cost here is its count of operations."""
    from coat_kernels.formats.triton_ptx import PORTABLE, PTX_FP8

    for op in OPS:
        module = import_module(f"coat_kernels.ops.{op}.triton")
        monkeypatch.setattr(module, "instruction_set", lambda _: (PTX_FP8 if PTX else PORTABLE).value)
        if isinstance(getattr(module, "_TILE", None), int):  # a launcher's; a kernel's own is a constant of the algorithm
            monkeypatch.setattr(module, "_TILE", 2048 * 8)
