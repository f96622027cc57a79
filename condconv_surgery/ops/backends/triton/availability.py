"""Which devices, dtypes and sizes the Triton backend supports."""

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

MAX_ELEMENTS = 1 << 31
"""Elements of all experts, and from the first to the last of one sample: offsets there are 32-bit."""

MAX_SAMPLES = (1 << 16) - 1
"""Samples of one launch: CUDA's limit of gridDim.z."""


def supports_tensor(x: Tensor) -> bool:
    """Whether Triton supports the device, the dtype and the size of ``x``."""
    return is_here(x.device) and x.dtype in DTYPES and fits_32_bits(span_of(x))


@torch.compiler.assume_constant_result
def is_here(device: torch.device) -> bool:
    """Whether Triton works here, and the device has the tensor cores that our kernels use (Ampere and later)."""
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
            "which is slower. Set CONDCONV_TRITON=0 to turn Triton off without this warning.",
            stacklevel=2,
        )
        return False


def kernels(name: str) -> Any:
    """The module of Triton kernels of this name. It imports Triton, which is installed only beside a GPU."""
    return import_module(f"condconv_surgery.ops.backends.triton.{name}")


def span_of(x: Tensor) -> int:
    """The largest offset between two elements of one sample in memory."""
    return sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))


def fits_32_bits(elements: int) -> bool:
    """Whether 32-bit offsets address this many elements."""
    return not isinstance(elements, int) or elements < MAX_ELEMENTS  # a symbolic number is not compared
