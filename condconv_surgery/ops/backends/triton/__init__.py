"""The way ``blocks`` and the routers on a CUDA device, in Triton.

Dense and depthwise layers in float32 (where TF32 is allowed), bfloat16 or float16; everything else is computed by
torch's own operators, and everything where Triton is not installed.
"""

from condconv_surgery.ops.backends.triton.autograd_function import convolve_at_once, kernel_at_once, scales_on_the_way
from condconv_surgery.ops.backends.triton.triton_convolution import convolve, convolve_backward, fits
from condconv_surgery.ops.backends.triton.triton_routing import attention, pool, sigmoid_gates

__all__ = [
    "attention",
    "convolve",
    "convolve_at_once",
    "convolve_backward",
    "fits",
    "kernel_at_once",
    "pool",
    "scales_on_the_way",
    "sigmoid_gates",
]
