"""The compiled kernels on or off, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from condconv_surgery import native

needs_kernels = [
    pytest.mark.skipif(not native.is_built(), reason="the kernels are not built"),
    pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="no AVX2"),
]


@contextmanager
def kernels(on: bool) -> Iterator[None]:
    """Enabled or disabled inside, and afterwards as before."""
    before = native.is_enabled()
    native.enable() if on else native.disable()
    try:
        yield
    finally:
        native.enable() if before else native.disable()
