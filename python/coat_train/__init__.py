"""Training with coat_kernels: `COATTrainer`, the demo, and the parts that trainers share."""

from importlib import import_module
from typing import Any

_EXPORTS = {"COATTrainer": ".trainer", "create_coat_trainer_for_flux_lora": ".trainer"}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Imported when asked for: `coat --help` needs no torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)
