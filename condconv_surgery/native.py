"""Switch for the compiled C++ kernels: ``enable``, ``disable``, ``is_enabled``, ``is_built``.

They run on x86 processors with AVX2 or AVX-512, and are compiled by g++ and ninja at the first ``enable`` (about a
minute, then cached). The environment variable ``CONDCONV_NATIVE=1`` enables them when layers are first imported, in
Python and on the command line.
"""

from condconv_surgery.ops.backends.cpp import disable, enable, is_built, is_enabled

__all__ = ["disable", "enable", "is_built", "is_enabled"]
