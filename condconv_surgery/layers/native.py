"""The way ``blocks`` in C++, an option for x86 processors: ``native.cpp`` says how it works.

Without it everything computes the same by torch's own operators. It takes over where it was measured to be faster
(``fits``): dense layers in float32 that are contiguous, and of those with 1x1 kernels the ones over small maps.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condconv_surgery.errors import InputError, one_line
from condconv_surgery.layers.kernel_convolution import format_of
from condconv_surgery.layers.mixture import Mixture

SOURCE = Path(__file__).with_suffix(".cpp")

MOST_TAPS = 256
"""Positions of a kernel: the compiled code mixes all of a channel at a time, in a part of the first level of cache."""

FEW_POSITIONS = 200
"""Up to so many output positions a 1x1 layer is faster here than as a batched matrix product: 1.6 to 1.9 against 2.1 to
2.5 of static at 7 px, 0.8 to 1.1 against 1.0 to 1.3 at 14 px, but 0.6 against 0.5 at 28 px (512 channels)."""

LONGEST_BUILD = 600
"""Seconds after which a lock is that of a process that is no more."""

_compiled: Any = None


def enable() -> None:
    """Compile the code, if this machine has not yet (half a minute), and use it from now on in this process.

    Raises ``InputError`` where it cannot be compiled or would not run.
    """
    global _compiled
    processor = torch.backends.cpu.get_cpu_capability()
    if not processor.startswith("AVX"):
        raise InputError(
            f"The native kernels cannot run on this processor (torch says {processor}).",
            "They are for x86 processors with AVX2.",
            "the same without them",
        )
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses a GPU that is not asked for
    try:
        folder = _build_folder()
        with _ninja_found():
            from torch.utils import cpp_extension  # slow to import, and needs setuptools

            flags = ["-O3", "-mavx2", "-mfma", "-fopenmp"]
            name = "condconv_surgery_native"
            _compiled = cpp_extension.load(name, [str(SOURCE)], extra_cflags=flags, build_directory=str(folder))
    except Exception as error:  # no compiler, ninja or headers; a compiler without vectors; no room
        raise InputError(
            f"The native kernels could not be compiled: {one_line(error)}",
            "That takes a C++ compiler (g++ 12 or newer, or clang), ninja and setuptools.",
            'pip install "condconv-surgery[native]", or the same without them',
        ) from error


def _build_folder() -> Path:
    """Of this source, torch and Python, in the user's cache; without the lock of a process that was killed in it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "condconv_surgery"
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    folder = cache / f"{digest}-torch{torch.__version__}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"  # of torch, which waits for it without end
    if lock.exists() and time.time() - lock.stat().st_mtime > LONGEST_BUILD:
        lock.unlink(missing_ok=True)
    return folder


@contextmanager
def _ninja_found() -> Iterator[None]:
    """The package's ninja is on the path, as it is in an activated environment."""
    path = os.environ.get("PATH", "")
    spec = importlib.util.find_spec("ninja")
    if shutil.which("ninja") is None and spec is not None:
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def disable() -> None:
    """Compute by torch's own operators again."""
    global _compiled
    _compiled = None


def is_enabled() -> bool:
    """The compiled code is in use."""
    return _compiled is not None


def fits(x: Tensor, experts: Tensor, stride: tuple[int, int] | list[int], groups: int) -> bool:
    """Whether the compiled code is in use and takes ``x`` [B, I, H, W], padded or not, and ``experts``.

    Never a comparison of the batch with anything but 1, so that one compiled graph serves every batch.
    """
    if _compiled is None or groups != 1 or x.device.type != "cpu":
        return False
    if x.dtype != torch.float32 or experts.dtype != torch.float32 or format_of(x) != torch.contiguous_format:
        return False
    taps = experts.shape[3] * experts.shape[4]
    if taps > 1:
        return bool(taps <= MOST_TAPS)
    positions = x.shape[2] // stride[0] * (x.shape[3] // stride[1])
    return bool(x.shape[0] == 1 or positions <= FEW_POSITIONS)


def may_be_called() -> bool:
    """Whether ``convolve`` can be called as it is: nothing is recorded or compiled.

    The operator of ``blocks``, which those need around it, costs as much as a small layer.
    """
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def convolve(
    x: Tensor, experts: Tensor, mixture: Mixture, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """``out_scale_b * conv(in_scale_b * x_b, K_b)``, [B, I, H, W] -> [B, O, H', W'], without autograd."""
    y: Tensor = _compiled.convolve(x.contiguous(), *_parts(experts, mixture), stride, padding, dilation)
    return y


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    mixture: Mixture,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    needs: list[bool],
) -> list[Tensor | None]:
    """The gradients of ``x``, the experts and the parts of the mixture, in this order.

    needs: of these, which are asked for; the others may be None.
    """
    grad, x, parts = grad.contiguous(), x.contiguous(), _parts(experts, mixture)
    geometry = (stride, padding, dilation)
    to_x = _compiled.input_gradient(grad, *parts, *geometry, *x.shape[2:]) if needs[0] else None
    rest = _compiled.kernel_gradients(grad, x, *parts, *geometry) if any(needs[1:]) else [None] * 5
    return [to_x, *rest]


def _parts(experts: Tensor, mixture: Mixture) -> list[Tensor | None]:
    given = (experts, *mixture)
    return [None if part is None else part.detach().to(torch.float32).contiguous() for part in given]
