"""Switch for the compiled C++ kernels: ``enable``, ``disable``, ``kernels``, and what is in use.

They run on x86 processors with AVX2 or AVX-512. ``pip install`` builds them where it finds g++ and torch, and a program
uses them from then on. ``CONDCONV_NATIVE=0`` turns them off; with ``CONDCONV_NATIVE=1`` their absence is an error, and
an installation that has none compiles them at first use.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["describe", "disable", "enable", "is_built", "is_enabled", "kernels"]


def enable() -> None:
    """Use the compiled kernels in this process; where the installation has none, compile them first, once.

    Raises ``InputError`` where they cannot be compiled or the processor is not supported.
    """
    _switch().enable()


def disable() -> None:
    """Compute with torch's operators again."""
    _switch().disable()


@contextmanager
def kernels(on: bool) -> Iterator[None]:
    """Enabled or disabled inside, and afterwards as before. Raises as ``enable``."""
    before = is_enabled()
    enable() if on else disable()
    try:
        yield
    finally:
        enable() if before else disable()


def is_enabled() -> bool:
    """Whether the compiled kernels are in use."""
    return bool(_switch().is_enabled())


def is_built() -> bool:
    """Whether ``enable`` has nothing to compile."""
    return bool(_switch().is_built())


def describe() -> str:
    """One line for people: whether this installation has the kernels. It does not import torch."""
    from condconv_surgery.ops.backends.cpp.build_kernels import LIBRARY

    if os.environ.get("CONDCONV_NATIVE", "").lower() in ("0", "false", "no", "off"):
        return "C++ kernels: off (CONDCONV_NATIVE=0)"
    if LIBRARY.exists():
        return "C++ kernels: built, for x86 with AVX2 or AVX-512"
    return (
        "C++ kernels: not built, so PyTorch's operators compute everything, slower on x86. "
        "They need g++ 12 and torch before: pip install torch torchvision && pip install --force-reinstall --no-deps ."
    )


def _switch() -> Any:
    """The loader, after the import of the operations has enabled what the installation has. It imports torch."""
    return importlib.import_module("condconv_surgery.ops.dispatch").load_kernels
