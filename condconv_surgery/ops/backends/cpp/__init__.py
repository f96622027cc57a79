"""The way ``blocks`` and the routers in C++, an option for x86 processors.

Without it everything computes the same by torch's own operators. It takes over where it was measured to be faster
(``fits``): dense and depthwise layers in float32 that are contiguous, and of those with 1x1 kernels the ones over small
maps; routers where nothing is recorded.
"""

from condconv_surgery.ops.backends.cpp.compile import disable, enable, enable_if_requested, is_built, is_enabled
from condconv_surgery.ops.backends.cpp.cpp_convolution import convolve, convolve_at_once, convolve_backward, fits
from condconv_surgery.ops.backends.cpp.cpp_routing import attention, pool, sigmoid_gates

__all__ = [
    "attention",
    "convolve",
    "convolve_at_once",
    "convolve_backward",
    "disable",
    "enable",
    "fits",
    "is_built",
    "is_enabled",
    "pool",
    "sigmoid_gates",
]

enable_if_requested()
