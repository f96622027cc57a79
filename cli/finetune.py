"""``condconv finetune``."""

from __future__ import annotations


def finetune() -> None:
    """Not there yet."""
