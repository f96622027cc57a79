"""Ask the system for large pages for new tensors on a CPU.

The system maps memory that was never written page by page, each at its first touch: 2 to 4 GB/s in pages of 4 KB, where
a tensor that is written again takes 13 GB/s and more (benchmarks/NOTES.md). glibc returns
such memory for nearly every tensor of more than 32 MiB, and for smaller ones after it returned its own to the system.
Linux maps 2 MiB at a time where it is asked to. torch asks for all its tensors with ``THP_MEM_ALLOC_ENABLE=1``; we ask
for outputs and gradients.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

from torch import Tensor

LARGE = 2 << 20
"""Bytes of a large page, and its alignment, on x86 and most ARM. Only whole pages are asked for."""


def in_large_pages(memory: Tensor) -> Tensor:
    """Ask for large pages where ``memory`` is not mapped yet, a hint that the system may ignore. Returns ``memory``."""
    size = memory.nbytes
    if size < LARGE or not memory.is_cpu:
        return memory
    advise = _advise()
    if advise is not None:
        start = memory.data_ptr()
        first, last = -(-start // LARGE) * LARGE, (start + size) // LARGE * LARGE
        if first < last:
            advise(first, last - first, mmap.MADV_HUGEPAGE)
    return memory


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The C library's ``madvise``, or None where it does not support large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
