"""Compile ``native.cpp`` once for each version of its sources, torch, Python and processor, and load it."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from condconv_surgery.errors import InputError, one_line

SOURCE = Path(__file__).with_name("native.cpp")

# by torch's name of the processor's instructions, the widest first
FLAGS = {"avx512": ["-mavx512f", "-mavx512vl", "-mfma"], "avx2": ["-mavx2", "-mfma"]}

_compiled: Any = None


def enable() -> None:
    """Use the compiled code in this process; the first call compiles it, in about a minute.

    Raises ``InputError`` where it cannot be compiled or the processor is not supported.
    """
    global _compiled
    if _instructions() not in FLAGS:
        raise InputError(
            f"The native kernels cannot run on this processor (torch says {_instructions()}).",
            "They are for x86 processors with AVX2.",
            "the same without them",
        )
    try:
        _compiled = _imported(_target()) if is_built() else _built(_target())
    except Exception as error:  # no compiler, ninja or headers; a compiler without vectors; no disk space
        raise InputError(
            f"The native kernels could not be compiled: {_reason(error)}",
            "That takes g++ 12 or newer, Python's headers, ninja and setuptools.",
            'pip install "condconv-surgery[native]" for the last two, or the same without them',
        ) from error


def enable_if_requested() -> None:
    """``enable`` where the environment says ``CONDCONV_NATIVE=1``. Called when the operations are first imported."""
    if os.environ.get("CONDCONV_NATIVE", "").lower() not in ("1", "true", "yes", "on"):
        return
    if not is_built():
        logging.getLogger("condconv_surgery").warning("Compiling the native kernels, once: about a minute ...")
    enable()


def _instructions() -> str:
    """The first of ``FLAGS`` that this processor supports, or else torch's name of its instructions."""
    has = torch.backends.cpu.get_cpu_capability()
    return next((name for name in FLAGS if has.lower().startswith(name)), has)


def is_built() -> bool:
    """Whether ``enable`` has nothing to compile."""
    return _target().exists()


def _target() -> Path:
    """The library of this source, torch, Python and processor in the user's cache.

    Its name is the module's; a process may load one for each set of instructions.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = given if given.is_absolute() else Path.home() / ".cache"
    files = [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]
    sources = [*(file.read_bytes() for file in files), repr(FLAGS).encode()]
    digest = hashlib.sha256(b"".join(sources)).hexdigest()[:12]
    versions = f"{digest}-torch{torch.__version__}-{sys.implementation.cache_tag}-{platform.machine()}"
    return cache / "condconv_surgery" / versions / f"condconv_surgery_{_instructions()}.so"


def _built(target: Path) -> Any:
    """Compile in a temporary folder, so that processes do not interfere and a killed one leaves nothing half-made."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that there is no CUDA compiler
    try:
        with TemporaryDirectory(dir=target.parent) as folder, _ninja_found():
            from torch.utils import cpp_extension  # slow to import, and needs setuptools

            if (versioner := getattr(cpp_extension, "JIT_EXTENSION_VERSIONER", None)) is not None:
                versioner.entries.pop(target.stem, None)  # it would take a failed build for a finished one
            # -fopenmp for the compiler only: the library is linked to the OpenMP runtime of torch
            flags = ["-O3", *FLAGS[_instructions()], "-fopenmp"]
            module = cpp_extension.load(target.stem, [str(SOURCE)], extra_cflags=flags, build_directory=folder)
            Path(folder, target.name).replace(target)
            return module
    finally:
        logger.setLevel(level)


def _imported(built: Path) -> Any:
    spec = importlib.util.spec_from_file_location(built.stem, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _ninja_found() -> Iterator[None]:
    """Put ninja of the Python package on the path, as an activated environment does."""
    path = os.environ.get("PATH")
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is not None:
        import ninja

        os.environ["PATH"] = os.pathsep.join(filter(None, [ninja.BIN_DIR, path]))
    try:
        yield
    finally:
        if path is not None:
            os.environ["PATH"] = path


def _reason(error: Exception) -> str:
    """The compiler's first error, or else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
    return lines[0] if lines else one_line(error)


def disable() -> None:
    """Compute with torch's operators again."""
    global _compiled
    _compiled = None


def is_enabled() -> bool:
    """Whether the compiled code is in use."""
    return _compiled is not None


def extension() -> Any:
    """The compiled module, or None where it is not enabled."""
    return _compiled
