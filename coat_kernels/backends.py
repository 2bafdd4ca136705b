"""Which backend serves which op on which device: data that dispatch, documentation and tests read."""

from __future__ import annotations

import importlib.util
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


SUPPORT = (OpSupport("group_quant"), OpSupport("adamw_fp8"))


class BackendUnavailable(RuntimeError):
    """An op was asked for on a device where its kernel cannot run."""


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _cpu_backend() -> str:
    return f"C++ ({native.isa()})" if native is not None else "reference (no C++ extension)"


def _cuda_backend() -> str:
    if not torch.cuda.is_available():
        return "unavailable: no CUDA device"
    if not has_triton():
        return "unavailable: triton is not installed"
    return "Triton"


def backends() -> dict[str, dict[str, str]]:
    """The table op x device -> backend for this machine.

    Returns:
        {op: {"reference": ..., "cpu": ..., "cuda": ...}}; an entry that cannot run says why.
    """
    return {row.op: {"reference": "PyTorch", "cpu": _cpu_backend(), "cuda": _cuda_backend()} for row in SUPPORT}


def require_backend(op: str, device: torch.device) -> str:
    """The backend ("C++", "Triton" or "reference") that runs `op` on `device`.

    Raises:
        BackendUnavailable: no kernel for this device, with the way out.
    """
    if device.type == "cpu":
        return "reference" if native is None else "C++"
    if device.type == "cuda" and has_triton():
        return "Triton"
    missing = "triton is not installed: pip install triton" if device.type == "cuda" else "the package has kernels for cpu and cuda devices"
    raise BackendUnavailable(
        f"{op} has no kernel for device {str(device)!r} ({missing}); "
        "`python -m coat_kernels` prints the table; the PyTorch reference runs anywhere with fused=False"
    )
