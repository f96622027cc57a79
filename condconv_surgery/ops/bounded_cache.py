"""A bounded memo dict, for keys such as image sizes of which ever new ones may come."""

from __future__ import annotations

from typing import TypeVar

MAX_ENTRIES = 4096

V = TypeVar("V")


def memoize(cache: dict[tuple[object, ...], V], key: tuple[object, ...], value: V) -> V:
    """``cache[key] = value``; a full cache is cleared first. Returns the value."""
    if len(cache) >= MAX_ENTRIES:
        cache.clear()
    cache[key] = value
    return value
