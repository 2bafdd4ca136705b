"""Which backend serves which op on which device: data that dispatch, documentation and tests read."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._native import native


@dataclass(frozen=True)
class OpSupport:
    """One row of the support table.

    Args:
        op: the op's stem.
        cpu, cuda: the accelerated backend on that device.
    """

    op: str
    cpu: str = "C++"
    cuda: str = "Triton"


SUPPORT = (
    OpSupport("group_quant"),
    OpSupport("adamw_fp8"),
    OpSupport("blockwise_quant", cuda="CUDA"),
    OpSupport("step_8bit", cuda="CUDA"),
    OpSupport("came_8bit", cuda="CUDA"),
    OpSupport("activation_quant"),
    OpSupport("tensor_quant"),
    OpSupport("norm"),
    OpSupport("norm_rope"),
    OpSupport("gated_residual"),
    OpSupport("activation"),
)
_GPU_BACKEND = {row.op: row.cuda for row in SUPPORT}


class BackendUnavailable(RuntimeError):
    """An op was asked for on a device where its kernel cannot run."""


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _cpu_backend() -> str:
    return f"C++ ({native.isa()})" if native is not None else "reference (no C++ extension)"


def _no_triton() -> str | None:
    return None if has_triton() else "triton is not installed: pip install triton"


def _no_cuda_kernels() -> str | None:
    if importlib.util.find_spec("coat_kernels._cuda") is None:
        return "this version of the package has no CUDA kernels for it"
    reason: str | None = importlib.import_module("coat_kernels._cuda").unavailable()
    return reason


#: Backend of a GPU -> why it cannot run here, with the way out, or None. Asked when an op is, not at import.
_MISSING: dict[str, Callable[[], str | None]] = {"Triton": _no_triton, "CUDA": _no_cuda_kernels}


def _cuda_backend(backend: str) -> str:
    if not torch.cuda.is_available():
        return "unavailable: no CUDA device"
    missing = _MISSING[backend]()
    return backend if missing is None else f"unavailable: {missing}"


def backends() -> dict[str, dict[str, str]]:
    """The table op x device -> backend for this machine.

    Returns:
        {op: {"reference": ..., "cpu": ..., "cuda": ...}}; an entry that cannot run says why.
    """
    return {row.op: {"reference": "PyTorch", "cpu": _cpu_backend(), "cuda": _cuda_backend(row.cuda)} for row in SUPPORT}


def require_backend(op: str, device: torch.device) -> str:
    """The backend ("C++", "Triton", "CUDA" or "reference") that runs `op` on `device`.

    Raises:
        BackendUnavailable: no kernel for this device, with the way out.
    """
    if device.type == "cpu":
        return "reference" if native is None else "C++"
    missing: str | None = "the package has kernels for cpu and cuda devices"
    if device.type == "cuda":
        backend = _GPU_BACKEND[op]
        missing = _MISSING[backend]()
        if missing is None:
            return backend
    raise BackendUnavailable(
        f"{op} has no kernel for device {str(device)!r} ({missing}); "
        "`python -m coat_kernels` prints the table; the PyTorch reference runs anywhere with fused=False"
    )
