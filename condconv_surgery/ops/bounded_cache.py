"""A memory of what was found before, for keys that could be ever new ones: pictures of ever new sizes, say."""

from __future__ import annotations

from typing import TypeVar

MOST_KNOWN = 4096

V = TypeVar("V")


def remember(known: dict[tuple[object, ...], V], key: tuple[object, ...], value: V) -> V:
    """``known[key] = value``, of a memory that is emptied when it is full. Returns the value."""
    if len(known) >= MOST_KNOWN:
        known.clear()
    known[key] = value
    return value
