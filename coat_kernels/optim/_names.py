"""Misspelt names, and the nearest right ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message that suggests the known name nearest to `name`; empty if none is near."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """`TypeError` for a name in `given` that is not known, with the nearest that is."""
    known = list(known)
    for name in given:
        if name not in known:
            raise TypeError(f"{owner} got an unexpected keyword argument {name!r}{nearest(name, known)}")
