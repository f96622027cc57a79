"""Fresh memory of results comes in large pages, as the kernel itself says."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from condconv_surgery.layers import Mixture
from condconv_surgery.native import kernels
from condconv_surgery.ops import large_pages as pages
from condconv_surgery.ops.large_pages import LARGE, in_large_pages
from tests.needs_kernels import needs_kernels

SMAPS = Path("/proc/self/smaps")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZE = 40 << 18
"""Numbers of 4 bytes: more than the 32 MiB from which glibc asks the system for most tensors' memory."""

counted = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not SMAPS.exists() or not THP.exists(), reason="no large pages to be seen"
)


def flags_at(address: int) -> list[str]:
    """What the kernel was advised about the memory at ``address``: proc(5), VmFlags; ``hg`` is for large pages."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:x}")


def whole_pages(memory: torch.Tensor) -> tuple[int, int]:
    """The first and the last byte of the large pages that lie within ``memory``."""
    start, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    return start + -start % LARGE, stop - stop % LARGE - 1


@counted
def test_all_whole_pages_of_a_tensor_and_no_others_are_asked_for() -> None:
    plain, memory = (torch.frombuffer(mmap.mmap(-1, 4 * SIZE, mmap.MAP_PRIVATE), dtype=torch.uint8) for _ in (0, 1))
    assert in_large_pages(memory) is memory
    ends = whole_pages(memory)
    assert all("hg" in flags_at(end) for end in ends)
    if ends[0] > memory.data_ptr():
        assert "hg" not in flags_at(ends[0] - 1)
    assert "hg" not in flags_at(plain.data_ptr() + LARGE)


@counted
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("groups", [1, 32])
def test_results_lie_in_them(groups: int, compiled: bool) -> None:
    with kernels(on=compiled):
        y, to_x = output_and_gradient(groups)
    for memory in (y, to_x):
        assert all("hg" in flags_at(end) for end in whole_pages(memory))


def output_and_gradient(groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer whose input and output have 40 MiB, in blocks."""
    x = torch.randn(20, 32, 128, 128, requires_grad=True)
    experts, gate = torch.randn(2, 32, 32 // groups, 3, 3), torch.rand(20, 2)
    shape = ([1, 1], [1, 1], [1, 1], groups)
    y, _ = torch.ops.condconv_surgery.convolve_blockwise(x, experts, *Mixture(gate), *shape, False)
    (to_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y, to_x


def test_small_tensors_and_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> int:
        raise AssertionError("asked")

    monkeypatch.setattr(pages, "_advise", lambda: fail)
    for memory in (torch.empty(100), torch.empty(0), torch.empty(SIZE, device="meta")):
        assert in_large_pages(memory) is memory
