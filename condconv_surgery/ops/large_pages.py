"""Large pages for fresh memory on a CPU.

Memory that was never written is handed out by the system page by page, each at its first touch: 2 to 4 GB/s in pages
of 4 KB where a tensor that is written again takes 13 GB/s and more (benchmarks/NOTES.md). glibc gives such memory to
nearly every tensor of more than 32 MiB, and to smaller ones after it gave its own back. Linux hands it out 2 MiB at a
time where it is asked to; torch asks so for all its tensors with ``THP_MEM_ALLOC_ENABLE=1``, here it is asked for
results.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

from torch import Tensor

LARGE = 2 << 20
"""Bytes of a large page, and its alignment; the usual size on x86 and ARM. Only whole ones are asked for."""


def in_large_pages(memory: Tensor) -> Tensor:
    """``memory`` itself, whose pages, where not there yet, come as large ones: a hint, which a system may pass over."""
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
    """The C library's ``madvise``, where there is one that knows of large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
