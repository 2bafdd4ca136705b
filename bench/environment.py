"""What a row must say about where it was measured."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "bitsandbytes", "torchao", "flashoptim", "deepspeed", "numpy")


def version(distribution: str) -> str | None:
    """Installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit(stated: str | None = None) -> str:
    """The commit measured: `stated` where the checkout carries no history, with `+dirty` for uncommitted sources.

    Files under `bench/results` do not count: they are what a run writes.
    """
    head = _output("git", "rev-parse", "HEAD")
    if head is None:
        return stated or "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
    return f"{head}+dirty" if changed else head


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        found = re.search(r"Kernel Module.*?(\d+\.\d[.\d]*)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    if found:
        return found[1]
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _cpu_isa() -> str | None:
    from coat_kernels._native import native

    return native.isa() if native is not None else None


def describe(device: str, stated_commit: str | None = None) -> dict:
    """Machine, driver, versions and commit, as every row carries them."""
    row = {
        "commit": commit(stated_commit),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_isa": _cpu_isa(),
        "versions": {name: found for name in PACKAGES if (found := version(name))},
    }
    if device == "cuda":
        row["gpu"] = torch.cuda.get_device_name()
        row["driver"] = _driver()
        row["cuda"] = torch.version.cuda
    return row
