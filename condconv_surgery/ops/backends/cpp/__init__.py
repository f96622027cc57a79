"""The backend in C++: ``blockwise``, routers and whole layers for x86 processors.

Its library is built when the package is installed and used from then on (``condconv_surgery.native`` is the switch).
Without it everything computes the same by torch's operators. It supports what was measured to be faster
(``cpp_convolution.supports``): dense, grouped and depthwise layers in float32, dense ones with 1x1 kernels over small
maps or of few weights; routers where autograd records nothing.
"""
