"""The way ``blocks`` in C++, an option for x86 processors: ``native.cpp`` says how it works.

Without it everything computes the same by torch's own operators. It takes over where it was measured to be faster
(``fits``): dense layers in float32 that are contiguous, and of those with 1x1 kernels the ones over small maps.
"""

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
from torch import Tensor
from torch.autograd import forward_ad

from condconv_surgery.errors import InputError, one_line
from condconv_surgery.layers.kernel_convolution import format_of
from condconv_surgery.layers.mixture import Mixture

SOURCE = Path(__file__).with_suffix(".cpp")

MOST_TAPS = 81
"""Positions of a kernel: the compiled code mixes all of a channel at a time, in a part of the first level of cache, and
adds up the gradients of the positions in memory of its own for each such part."""

FEW_POSITIONS = 200
"""Up to so many output positions a 1x1 layer is faster here than as a batched matrix product: 1.6 to 1.9 against 2.1 to
2.5 of static at 7 px, 0.8 to 1.1 against 1.0 to 1.3 at 14 px, but 0.6 against 0.5 at 28 px (512 channels)."""

NAME = "condconv_surgery_native"

_compiled: Any = None


def enable() -> None:
    """Use the compiled code from now on in this process; it is compiled first, in half a minute, if it is not yet.

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
    try:
        _compiled = _imported(_target()) if is_built() else _built(_target())
    except Exception as error:  # no compiler, ninja or headers; a compiler without vectors; no room
        raise InputError(
            f"The native kernels could not be compiled: {_reason(error)}",
            "That takes g++ 12 or newer, Python's headers, ninja and setuptools.",
            'pip install "condconv-surgery[native]" for the last two, or the same without them',
        ) from error


def is_built() -> bool:
    """``enable`` has nothing to compile."""
    return _target().exists()


def _target() -> Path:
    """The library of this source, torch, Python and processor in the user's cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = given if given.is_absolute() else Path.home() / ".cache"
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    versions = f"{digest}-torch{torch.__version__}-{sys.implementation.cache_tag}-{platform.machine()}"
    return cache / "condconv_surgery" / versions / f"{NAME}.so"


def _built(target: Path) -> Any:
    """Compiled in a folder of its own, so that processes do not meet and a killed one leaves nothing half-made."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it misses a GPU that is not asked for
    try:
        with TemporaryDirectory(dir=target.parent) as folder, _ninja_found():
            from torch.utils import cpp_extension  # slow to import, and needs setuptools

            cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(NAME, None)  # it takes a failed build for done
            # -fopenmp for the compiler alone: at link time the library takes the OpenMP runtime that torch brings
            flags = ["-O3", "-mavx2", "-mfma", "-fopenmp"]
            module = cpp_extension.load(NAME, [str(SOURCE)], extra_cflags=flags, build_directory=folder)
            Path(folder, target.name).replace(target)
            return module
    finally:
        logger.setLevel(level)


def _imported(built: Path) -> Any:
    spec = importlib.util.spec_from_file_location(NAME, built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _ninja_found() -> Iterator[None]:
    """The package's ninja is on the path, as it is in an activated environment."""
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
    """The compiler's own first error, or else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
    return lines[0] if lines else one_line(error)


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
    if _compiled is None or groups != 1 or x.device.type != "cpu" or experts.device != x.device:
        return False
    if x.dtype != torch.float32 or experts.dtype != torch.float32 or format_of(x) != torch.contiguous_format:
        return False
    taps = experts.shape[3] * experts.shape[4]
    if taps > 1:
        return bool(taps <= MOST_TAPS)
    positions = x.shape[2] // stride[0] * (x.shape[3] // stride[1])
    return bool(x.shape[0] == 1 or positions <= FEW_POSITIONS)


def may_be_called() -> bool:
    """Whether ``convolve`` can be called as it is: nothing records, traces, counts, transforms or compiles.

    The operator of ``blocks``, which those see, costs as much as a small layer.
    """
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


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
    given = (grad.contiguous(), x.contiguous(), *_parts(experts, mixture), stride, padding, dilation)
    to_x = _compiled.input_gradient(*given) if needs[0] else None
    return [to_x, *(_compiled.kernel_gradients(*given) if any(needs[1:]) else [None] * 5)]


def _parts(experts: Tensor, mixture: Mixture) -> list[Tensor | None]:
    given = (experts, *mixture)
    return [None if part is None else part.detach().to(torch.float32).contiguous() for part in given]
