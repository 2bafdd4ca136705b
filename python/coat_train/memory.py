"""Where the memory of a training step goes: samples between its phases, and the bytes that a forward pass leaves behind."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coat_kernels import CoatWarning

#: A GB here is 2^30 bytes, as in torch's own reports and in users' guides.
GB = 1 << 30
PHASES = ("before_forward", "after_forward", "after_backward", "after_optimizer_step")

_STATM = Path("/proc/self/statm")


def memory_in_use(device: torch.device) -> tuple[int, int] | None:
    """Bytes allocated and bytes reserved on a GPU. On a CPU both are the process's resident set; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    try:
        resident = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
    return resident, resident


@cache
def _say_unknown() -> None:
    warnings.warn(
        "this system does not tell how much memory the process uses (/proc is missing), so no memory is logged on the CPU; "
        "COATConfig(log_memory_stats=False) silences this",
        CoatWarning,
        stacklevel=4,
    )


def to_stdout(line: str) -> None:
    sys.stdout.write(line + "\n")


class MemoryLog:
    """Samples of memory, one line each, and their largest and mean.

    Args:
        write: gets each line.
    """

    def __init__(self, write: Callable[[str], None] = to_stdout) -> None:
        self.write = write
        self.samples = 0
        self.peak = [0, 0]  # allocated, reserved
        self.total = [0, 0]
        self.devices: set[str] = set()

    def sample(self, device: torch.device, step: int, phase: str) -> None:
        """Write `[phase] Step N: Allocated: x.xxGB, Reserved: x.xxGB` and count it."""
        found = memory_in_use(device)
        if found is None:
            _say_unknown()
            return
        self.samples += 1
        self.devices.add(device.type)
        self.peak = [max(pair) for pair in zip(self.peak, found, strict=True)]
        self.total = [sum(pair) for pair in zip(self.total, found, strict=True)]
        self.write(f"[{phase}] Step {step}: Allocated: {found[0] / GB:.2f}GB, Reserved: {found[1] / GB:.2f}GB")

    def report(self) -> dict[str, Any]:
        """Largest and mean of the samples in GB; empty if there were none.

        Returns:
            `peak_allocated_gb`, `peak_reserved_gb`, `avg_allocated_gb`, `avg_reserved_gb`, `total_samples`, and `source`: what was
            measured.
        """
        if not self.samples:
            return {}
        values: dict[str, Any] = {}
        for i, name in enumerate(("allocated", "reserved")):
            values[f"peak_{name}_gb"] = self.peak[i] / GB
            values[f"avg_{name}_gb"] = self.total[i] / self.samples / GB
        sources = {"cuda": "torch's CUDA allocator", "cpu": "resident set of the process"}
        source = ", ".join(sources[each] for each in sorted(self.devices))
        return {**values, "total_samples": self.samples, "source": source}


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of those of the values that are tensors."""
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state tensors."""
    return tensor_bytes(value for state in optimizer.state.values() for value in state.values())


class LiveStorages(TorchDispatchMode):
    """Watches every storage that an operation returns while the mode is on.

    `alive()` afterwards gives {shape, dtype: bytes} of those that still exist. Whatever keeps a tensor, autograd's saved variables,
    a Python attribute or a cache, it is counted, once a storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                storage = tensor.untyped_storage()
                name = f"{func._schema.name.split('::')[1]} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), name)
        return out

    def alive(self, but: tuple[Tensor, ...] = ()) -> dict[str, int]:
        """Bytes by what made them, without the tensors `but`."""
        gc.collect()
        known = {tensor.untyped_storage()._cdata for tensor in but}
        found: dict[str, int] = {}
        for key, (reference, nbytes, name) in self.seen.items():
            if key not in known and not reference.expired():
                found[name] = found.get(name, 0) + nbytes
        return found
