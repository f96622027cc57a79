"""When the compiled code may be called past torch's dispatcher, which costs as much as a small layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from condconv_surgery.layers.native.building import extension

PLAIN = (Tensor, nn.Parameter)


def code_for(*tensors: Tensor | None) -> Any:
    """The compiled module, or None where it is not to be called.

    That is, where it is not in use, where something records, traces, counts, transforms or compiles, or where a tensor
    is not what it seems to be.
    """
    code = extension()
    if code is None or _is_watched() or not are_plain(*tensors):
        return None
    return code


def _is_watched() -> bool:
    return bool(
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def are_plain(*tensors: Tensor | None) -> bool:
    """No subclasses, whose numbers may be elsewhere."""
    return all(t is None or type(t) in PLAIN for t in tensors)
