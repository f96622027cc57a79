"""When a test of the compiled kernels can run."""

from __future__ import annotations

import pytest
import torch

from condconv_surgery import native

needs_kernels = [
    pytest.mark.skipif(not native.is_built(), reason="the kernels are not built"),
    pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="no AVX2"),
]
