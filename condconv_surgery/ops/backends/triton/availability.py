"""Where Triton can be called, and on what."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from condconv_surgery.errors import one_line

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MOST_NUMBERS = 1 << 31
"""Of all experts, and from the first to the last of one sample: places there are 32-bit numbers."""

MOST_SAMPLES = (1 << 16) - 1
"""Of one call: the longest that a grid of programs can be in its third direction."""


def takes(x: Tensor) -> bool:
    """Where ``x`` is, Triton can be called on numbers of its dtype, and on so many."""
    return is_here(x.device) and x.dtype in DTYPES and is_small(span_of(x))


@torch.compiler.assume_constant_result
def is_here(device: torch.device) -> bool:
    """Triton is installed, and the device has the tensor cores that it is asked for (Ampere and later)."""
    return _is_here(device)


@cache
def _is_here(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    if os.environ.get("CONDCONV_TRITON") == "0" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:  # it compiles a piece of C at its first use
        return import_module("triton.runtime").driver.active.utils is not None
    except Exception as error:
        warnings.warn(
            f"Triton does not work here ({one_line(error)}): conditional layers are computed by torch's own operators, "
            "which takes longer. CONDCONV_TRITON=0 asks for that in silence.",
            stacklevel=2,
        )
        return False


def room(name: str) -> Any:
    """One of the modules that need Triton, which is installed only beside a GPU."""
    return import_module(f"condconv_surgery.ops.backends.triton.{name}")


def span_of(x: Tensor) -> int:
    """How far apart two numbers of one sample can be in memory."""
    return sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))


def is_small(number: int) -> bool:
    """So many numbers have places of 32 bits."""
    return not isinstance(number, int) or number < MOST_NUMBERS  # a symbolic one is not compared
