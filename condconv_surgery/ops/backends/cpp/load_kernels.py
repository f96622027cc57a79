"""Load the library of kernels, compile it where it is missing, and say whether it is in use."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from condconv_surgery.errors import InputError, one_line
from condconv_surgery.ops.backends.cpp.build_kernels import LIBRARY, BuildError, build, digest
from condconv_surgery.ops.backends.cpp.operators import declare_operators

INSTRUCTIONS = ("avx512", "avx2")
"""For which there are kernels, by the start of torch's name of what the processor has; the widest first."""

_enabled: Any = None


def enable() -> None:
    """Use the compiled kernels in this process; where the installation has none, compile them first, once.

    Raises ``InputError`` where they cannot be compiled or the processor is not supported.
    """
    global _enabled
    if _instructions() is None:
        raise InputError(
            f"The native kernels cannot run on this processor (torch says {torch.backends.cpu.get_cpu_capability()}).",
            "They are for x86 processors with AVX2.",
            "the same without them",
        )
    try:
        if not is_built():
            logging.getLogger("condconv_surgery").warning("Compiling the native kernels, once: about 20 seconds ...")
            build(_own_build())
        _enabled = _loaded(built_library(), _instructions())
    except (BuildError, OSError) as error:
        raise InputError(
            f"The native kernels could not be compiled: {one_line(error)}",
            "That takes Linux on x86_64, g++ 12 or newer, and torch.",
            "the same without them",
        ) from error


def enable_by_default() -> None:
    """Use the library of the installation, unless ``CONDCONV_NATIVE=0``; ``CONDCONV_NATIVE=1`` insists as ``enable``.

    Called when the operations are first imported.
    """
    global _enabled
    wanted = os.environ.get("CONDCONV_NATIVE", "").lower()
    if wanted in ("0", "false", "no", "off"):
        return
    if wanted in ("1", "true", "yes", "on"):
        enable()
    elif LIBRARY.exists() and _instructions() is not None:
        try:
            _enabled = _loaded(LIBRARY, _instructions())
        except OSError as error:  # built for another system, or a file that is damaged
            logging.getLogger("condconv_surgery").warning("The native kernels do not load: %s", one_line(error))


def disable() -> None:
    """Compute with torch's operators again."""
    global _enabled
    _enabled = None


def is_enabled() -> bool:
    """Whether the compiled kernels are in use."""
    return _enabled is not None


def is_built() -> bool:
    """Whether ``enable`` has nothing to compile."""
    return built_library().exists()


def built_library() -> Path:
    """That of the installation, or else the one that ``enable`` compiles."""
    return LIBRARY if LIBRARY.exists() else _own_build()


def kernels() -> Any:
    """The operators of the library by name, or None where it is not in use."""
    return _enabled


def _own_build() -> Path:
    """In the user's cache, by version of the sources."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = given if given.is_absolute() else Path.home() / ".cache"
    return folder / "condconv_surgery" / digest() / LIBRARY.name


def _instructions() -> str | None:
    """The first of ``INSTRUCTIONS`` that torch takes this processor to have."""
    has = torch.backends.cpu.get_cpu_capability().lower()
    return next((name for name in INSTRUCTIONS if has.startswith(name)), None)


def _loaded(library: Path, instructions: str | None) -> Any:
    """The operators, with the kernels for ``instructions``. Raises ``OSError`` where that is not possible."""
    operators, use = _load_once(library)
    if instructions is None or not use(instructions.encode()):
        raise OSError(f"this processor lacks {instructions}, which torch says it has")
    return operators


@cache
def _load_once(library: Path) -> tuple[SimpleNamespace, Any]:
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    use = ctypes.CDLL(str(library)).condconv_use
    use.argtypes, use.restype = [ctypes.c_char_p], ctypes.c_bool
    return declare_operators(), use
