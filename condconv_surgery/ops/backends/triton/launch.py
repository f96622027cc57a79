"""Launches of Triton's kernels. Python's part of one costs as much as a small layer, so it is kept from the first time.

Triton looks at each argument of each call to find the machine code for it: at the dtype of a tensor and whether its
memory begins at a multiple of 16 bytes, at a number that is 1 or a multiple of 16. Where all of these are as in an
earlier call, so is the machine code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condconv_surgery.ops.bounded_cache import remember

Pair = tuple[int, int]

ANY_NUMBER = ["height", "width", "out_height", "out_width"]
"""Of no use to the compiler: one machine code for pictures of all sizes."""

_known: dict[tuple[object, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 3,
) -> None:
    """``kernel[grid](*tensors, *numbers, **constants)`` on the device of the tensors.

    In the kernel's signature tensors come first, then numbers, then ``tl.constexpr``, all in the order given here.
    """
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, warps, stages)
        return
    seen = tuple([(tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors])
    fixed = tuple(constants.values())
    key = (id(kernel), device.index, seen, numbers, fixed, warps, stages)
    compiled = _known.get(key)
    if compiled is None:
        compiled = kernel[grid](*tensors, *numbers, **constants, num_warps=warps, num_stages=stages)
        if compiled is not None:  # it is when interpreted
            remember(_known, key, compiled)
    else:
        compiled[grid](*tensors, *numbers, *fixed)


def power_of_two(number: int) -> int:
    """The least that is no less than ``number``: the sides of what a program holds are powers of two."""
    return 1 << max(0, number - 1).bit_length()


def constants_of(size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> dict[str, int]:
    """The geometry of a convolution, as its kernels call it."""
    names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    return dict(zip(names, (*size, *stride, *padding, *dilation), strict=True))
