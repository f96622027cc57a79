"""The blocks of samples and filters that ``blockwise`` computes at a time, so that their kernels stay in the cache.

Samples: the kernels of few of them exist at a time. Filters: of a dense layer with many weights only some are computed
at a time, for every sample, so that their experts come from memory once and then from the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.per_sample_conv import counts_as_cpu

MAX_KERNEL_BYTES = 28 << 20
"""The kernels of one block. glibc serves most allocations of 32 MiB or more with fresh pages; those were written
at 1.6 GB/s where warm ones took 13 GB/s (benchmarks/NOTES.md)."""

MAX_CACHED_BYTES = 10 << 20
"""The kernels of one block of a dense layer on a CPU, and the experts that they are mixed from, each: together a large
part of a 32 MiB cache. Mixing 4 experts, 512 channels 3x3, took 1.09 of the static convolution at 7 px without
this bound and 0.35 with it."""

MAX_DEVICE_BYTES = 1 << 30
"""The kernels of one block on any other device, where memory is the limit and not a cache."""

MIN_FILTERS = 64
"""A convolution of fewer filters costs more than the cache saves: 128 channels at 28 px took 1.11 of static in two
halves of 64, 1.21 in four of 32."""

MAX_WHOLE_BYTES = 10 << 20
"""Up to this many bytes of input a grouped convolution of the whole batch beats blocks, whose outputs are copied into
one: 1.0 against 1.5 of static at 384 channels and 14 px (9 MiB), 0.6 against 0.3 at 192 channels and 28 px (18 MiB)."""

MAX_STACKED_BYTES = 4 << 20
"""The input of one block of a grouped convolution, which torch reads once and copies once: it should stay in the second
and third level of cache."""


class Block(NamedTuple):
    """The samples and the filters that are computed at a time."""

    samples: slice
    filters: slice

    @property
    def size(self) -> int:
        """How many samples."""
        return int(self.samples.stop - self.samples.start)

    @property
    def first(self) -> bool:
        """The first block of these samples: nothing of their output is computed yet."""
        return bool(self.filters.start == 0)

    def of(self, mixture: Mixture) -> Mixture:
        """The part of a mixture for this block's kernels."""
        gate, spatial, in_scale, out_scale = (None if part is None else part[self.samples] for part in mixture)
        return Mixture(gate, spatial, in_scale, None if out_scale is None else out_scale[:, self.filters])

    def view_of(self, buffer: Tensor, shape: torch.Size) -> Tensor:
        """This block's kernels in ``buffer``: [n, O, I/G, kh, kw] for experts of ``shape`` [E, O, I/G, kh, kw]."""
        return buffer[: self.size * shape[1:].numel()].view(self.size, *shape[1:])


def kernel_buffer(blocks: list[Block], experts: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer for the kernels of any one block, reused by the next, so that no fresh pages are asked for."""
    return experts.new_empty(max(block.size * experts[0, block.filters].numel() for block in blocks), dtype=dtype)


def blocks_of(x: Tensor, experts: Tensor, groups: int) -> list[Block]:
    """The blocks that cover every sample of ``x`` [B, I, H, W] and filter of ``experts`` [E, O, I/G, kh, kw] once.

    All samples of some filters come before the next filters.
    """
    batch, filters = x.shape[0], experts.shape[1]
    chunk, most, on_cpu = filters, MAX_KERNEL_BYTES, counts_as_cpu(x)
    if not on_cpu:
        most = MAX_DEVICE_BYTES
    elif groups == 1:
        chunk, most = _filters_at_a_time(experts), MAX_CACHED_BYTES
    size = max(1, most // max(1, experts[0, :chunk].numel() * experts.element_size()))
    if on_cpu and groups > 1 and x.numel() * x.element_size() > MAX_WHOLE_BYTES:
        size = max(1, min(size, MAX_STACKED_BYTES // max(1, x[0].numel() * x.element_size())))
    return [
        Block(slice(start, min(start + size, batch)), slice(first, min(first + chunk, filters)))
        for first in range(0, filters, chunk)
        for start in range(0, batch, size)
    ]


def _filters_at_a_time(experts: Tensor) -> int:
    """As many as ``MAX_CACHED_BYTES`` of all experts hold, in parts of one size."""
    filters = experts.shape[1]
    parts = -(-experts.numel() * experts.element_size() // MAX_CACHED_BYTES)
    return min(filters, max(MIN_FILTERS, -(-filters // parts)))
