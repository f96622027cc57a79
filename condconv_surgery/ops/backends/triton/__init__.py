"""The Triton backend: ``blockwise`` and routers on a CUDA device (``triton_backend``)."""
