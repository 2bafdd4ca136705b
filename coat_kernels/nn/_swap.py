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
    """Base of classes made by `_swapped_class`, which pickle cannot find by name: it makes them again from their parts."""

    _coat_parts: tuple[type, ...]  # what was put in front, the last first, and the class that it was put in front of

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, self._coat_parts, *reduced[2:])


@cache
def _swapped_class(forward: Any, original: Any) -> Any:
    """A class of original's name that is `forward` first and `original` in all else."""
    swapped = issubclass(original, _Swapped)
    bases = (forward, original) if swapped else (_Swapped, forward, original)
    parts = (forward, *(original._coat_parts if swapped else (original,)))
    return type(original.__name__, bases, {"_coat_parts": parts, "__module__": original.__module__})


def _new(*parts: Any) -> Any:
    *forwards, made = parts
    for forward in reversed(forwards):
        made = _swapped_class(forward, made)
    return made.__new__(made)


def put_in_front(module: nn.Module, forward: Any) -> None:
    """Let a module's methods be looked for in `forward` first."""
    original: Any = type(module)
    module.__class__ = _swapped_class(forward, original)


def swap(module: nn.Module, forward: type[Saving8Bit], config: COATConfig) -> None:
    """Give a module the forward pass of `forward`, a subclass of `Saving8Bit`; all else stays its own class's.

    A class of this package that is a subclass of the module's class replaces it whole.
    """
    if issubclass(forward, type(module)):
        module.__class__ = forward
    else:
        put_in_front(module, forward)
    module.coat_config = config  # type: ignore[assignment]


def is_converted(module: nn.Module) -> bool:
    return isinstance(module, Saving8Bit)
