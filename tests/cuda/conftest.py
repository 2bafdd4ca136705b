"""The CUDA launchers on a machine without a GPU: an emulator stands in for the driver, on tensors in host memory."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from coat_kernels._cuda import Kernel

HERE = Path(__file__).parent
#: Blocks that the emulated device runs at once: few, so that a tensor of a few tiles makes them walk.
RESIDENT_BLOCKS = 3


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """`emulated.cpp`, compiled: contraction off, as exact parts of the kernels ask of nvcc by intrinsics; unaligned accesses trap."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler to emulate CUDA kernels with")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    command = [compiler, *options, str(HERE / "emulated.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(params=["ascending", "descending", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run: emulated on CPU tensors, the threads of a block in one order and in the other; or on a GPU."""
    if request.param == "gpu":
        return torch.device("cuda")
    library = request.getfixturevalue("emulated")

    def launch(kernel: Kernel, arguments: ctypes.Structure, device: torch.device, blocks: int, *, cooperative: bool = False) -> None:
        assert device.type == "cpu"
        assert ctypes.sizeof(arguments) == getattr(library, f"sizeof_{kernel.name}")()
        if blocks > 0:
            run = getattr(library, f"emulate_{kernel.name}")
            run(ctypes.byref(arguments), min(blocks, RESIDENT_BLOCKS), kernel.threads, int(request.param == "descending"))

    monkeypatch.setattr(Kernel, "launch", launch)
    monkeypatch.setattr(Kernel, "resident_blocks", lambda kernel, device: RESIDENT_BLOCKS)
    return torch.device("cpu")
