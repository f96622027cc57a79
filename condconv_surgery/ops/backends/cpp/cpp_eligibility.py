"""Whether a call may go to the compiled code past torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condconv_surgery.ops.backends.cpp.load_kernels import kernels
from condconv_surgery.ops.tracing_state import are_plain, is_intercepted


def kernels_for(*tensors: Tensor | None) -> Any:
    """The compiled operators, or None.

    None where they are not enabled, where autograd records, where a call is traced, compiled or intercepted, or where a
    tensor is of a subclass.
    """
    code = kernels()
    if code is None or torch.is_grad_enabled() or is_intercepted() or not are_plain(*tensors):
        return None
    return code
