"""The C++ backend: ``blockwise`` and routers compiled for x86 processors, an option that ``enable`` switches on.

Without it everything computes the same by torch's operators. It supports what was measured to be faster
(``cpp_convolution.supports``): dense and depthwise layers in float32 that are contiguous, those with 1x1 kernels over
small maps only; routers where autograd records nothing.
"""

from condconv_surgery.ops.backends.cpp.compile import disable, enable, enable_if_requested, is_built, is_enabled

__all__ = ["disable", "enable", "is_built", "is_enabled"]

enable_if_requested()
