"""The C++ extension, or None with one warning where it was not built."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


class CoatWarning(UserWarning):
    """Something the package does in a slower or smaller way than it could."""


def _load() -> Any:
    try:
        return importlib.import_module("coat_kernels._C")
    except ImportError as error:
        warnings.warn(
            f"coat_kernels was installed without its C++ extension ({error}); the PyTorch reference serves on CPUs, many times slower. "
            "Reinstall where a C++17 compiler and CMake are found.",
            CoatWarning,
            stacklevel=2,
        )
        return None


native: Any = _load()
