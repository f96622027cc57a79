"""``condconv convert``."""

from __future__ import annotations


def convert() -> None:
    """Not there yet."""
