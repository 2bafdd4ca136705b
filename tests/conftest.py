"""Fixtures that every folder shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from coat_kernels._native import native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that a kernel may run on."""
    return torch.device(request.param)


@pytest.fixture(params=[*(native.isas() if native is not None else ["reference"]), pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device that a kernel may run on; the CPU once with each instruction set that it has kernels for."""
    if native is None or request.param == "cuda":
        yield torch.device("cuda" if request.param == "cuda" else "cpu")
        return
    before = native.isa()
    native.use_isa(request.param)
    yield torch.device("cpu")
    native.use_isa(before)
