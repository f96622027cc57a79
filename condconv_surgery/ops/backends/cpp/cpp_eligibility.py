"""When the compiled code may be called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condconv_surgery.ops.backends.cpp.compile import extension
from condconv_surgery.ops.tracing_state import are_plain, is_watched


def code_for(*tensors: Tensor | None) -> Any:
    """The compiled module, or None where it is not to be called.

    That is, where it is not in use, where something records, traces, counts, transforms or compiles, or where a tensor
    is not what it seems to be.
    """
    code = extension()
    if code is None or torch.is_grad_enabled() or is_watched() or not are_plain(*tensors):
        return None
    return code
