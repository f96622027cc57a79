"""When the compiled code may be called past torch's dispatcher, which costs as much as a small layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = (Tensor, nn.Parameter)


def may_be_called(*tensors: Tensor | None) -> bool:
    """Nothing records, traces, counts, transforms or compiles, and the tensors are what they seem to be."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ) and are_plain(*tensors)


def are_plain(*tensors: Tensor | None) -> bool:
    """No subclasses, whose numbers may be elsewhere."""
    return all(t is None or type(t) in PLAIN for t in tensors)
