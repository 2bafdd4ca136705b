"""One tiny run of the demo, shared by the tests: its start costs seconds."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("skimage")

from coat_train.cli import settle_libraries
from rich.console import Console

settle_libraries()

from coat_train.comparison import Outcome, Settings, run_demo  # noqa: E402  (diffusers logs on import)


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Settings, str]:
    """What a quick run returned, its settings, and what it printed."""
    settings = Settings.quick(tmp_path_factory.mktemp("demo"))
    console = Console(file=io.StringIO(), width=140)
    outcome = run_demo(settings, console)
    return outcome, settings, console.file.getvalue()


@pytest.fixture
def base_folder(quick: tuple[Outcome, Settings, str]) -> Path:
    """Folder of the base model that the quick run saved."""
    return quick[1].output / "transformer"


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> Iterator[None]:
    """`LiveStorages` collects garbage: over the modules of diffusers and transformers that takes most of a second, each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
