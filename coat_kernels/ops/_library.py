"""The `torch.library` namespace that every op of the package registers in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

LIBRARY = Library("coat_kernels", "FRAGMENT")


def register(name: str, arguments: Callable[..., tuple[Any, ...]], run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op whose implementation and fake take the same bundles.

    Args:
        name: of an op that LIBRARY has defined.
        arguments: checks the flat arguments of the op's schema and returns those of `run` and `fake`.
        run: computes, on CPUs and GPUs.
        fake: allocates what `run` returns.
    """

    def implementation(*given: Any, **named: Any) -> Any:
        return run(*arguments(*given, **named))

    def fake_implementation(*given: Any, **named: Any) -> Any:
        return fake(*arguments(*given, **named))

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"coat_kernels::{name}", fake_implementation, lib=LIBRARY)
