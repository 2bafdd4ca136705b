"""Changing a module's class in place: the same object, names, parameters and hooks, and still an instance of its own class."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from ..config import COATConfig


class Saving8Bit:
    """What the modules of this package share: the configuration they save by."""

    coat_config: COATConfig

    @property
    def _format(self) -> dict[str, Any]:
        return {"fmt": self.coat_config.activation_format, "group_size": self.coat_config.activation_group_size}


class Unconvertible(Exception):
    """A module that stays as it is; the message says why."""


class _Swapped:
    """Base of classes made by `_swapped_class`, which pickle cannot find by name: it makes them again from their two parts."""

    _coat_parts: tuple[type, type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, self._coat_parts, *reduced[2:])


@cache
def _swapped_class(forward: type, original: type) -> type:
    return type(original.__name__, (_Swapped, forward, original), {"_coat_parts": (forward, original), "__module__": original.__module__})


def _new(forward: type, original: type) -> Any:
    made: Any = _swapped_class(forward, original)
    return made.__new__(made)


def swap(module: nn.Module, forward: type[Saving8Bit], config: COATConfig) -> None:
    """Give a module the forward pass of `forward`, a subclass of `Saving8Bit`; all else stays its own class's.

    A class of this package that is a subclass of the module's class replaces it whole.
    """
    original: Any = type(module)
    made: Any = forward if issubclass(forward, original) else _swapped_class(forward, original)  # type: ignore[arg-type]
    module.__class__ = made
    module.coat_config = config  # type: ignore[assignment]


def is_converted(module: nn.Module) -> bool:
    return isinstance(module, Saving8Bit)
