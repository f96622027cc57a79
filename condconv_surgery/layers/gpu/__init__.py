"""The way ``blocks`` and the pooling of routers on a CUDA device, in Triton.

Dense and depthwise layers in float32 (where TF32 is allowed), bfloat16 or float16; everything else is computed by
torch's own operators, and everything where Triton is not installed.
"""

from condconv_surgery.layers.gpu.calls import convolve_at_once, pool
from condconv_surgery.layers.gpu.convolution import convolve, convolve_backward, fits

__all__ = ["convolve", "convolve_at_once", "convolve_backward", "fits", "pool"]
