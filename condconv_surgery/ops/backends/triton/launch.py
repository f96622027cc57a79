"""Launches of Triton's kernels. Triton's Python code for one costs as much as a small layer, so it is memoized.

Triton specialises machine code for the dtype of each tensor, for whether its address is a multiple of 16, and for
scalars that are 1 or a multiple of 16. Where all of these are as in an earlier call, so is the machine code, and it is
launched directly. Where a version of Triton has no compiled kernel to launch so, each launch goes through Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condconv_surgery.ops.bounded_cache import memoize

Pair = tuple[int, int]

NOT_SPECIALISED = ["height", "width", "out_height", "out_width"]
"""Arguments that the compiler does not specialise on: one machine code for images of all sizes."""

_compiled: dict[tuple[object, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    scalars: tuple[float, ...],
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 3,
) -> None:
    """``kernel[grid](*tensors, *scalars, **constants)`` on the device of the tensors.

    In the kernel's signature tensors come first, then scalars, then ``tl.constexpr``, all in the order given here.
    """
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, scalars, constants, warps, stages)
        return
    signature = tuple([(tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors])
    fixed = tuple(constants.values())
    key = (id(kernel), device.index, signature, scalars, fixed, warps, stages)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*tensors, *scalars, **constants, num_warps=warps, num_stages=stages)
        if hasattr(compiled, "__getitem__"):  # not in the interpreter, which returns None
            memoize(_compiled, key, compiled)
    else:
        compiled[grid](*tensors, *scalars, *fixed)


def power_of_two(number: int) -> int:
    """The next power of two, at least ``number``: the sides of a Triton block are powers of two."""
    return 1 << max(0, number - 1).bit_length()


def constants_of(size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> dict[str, int]:
    """The geometry of a convolution by the names that the kernels use."""
    names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    return dict(zip(names, (*size, *stride, *padding, *dilation), strict=True))
