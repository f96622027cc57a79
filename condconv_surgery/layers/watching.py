"""Whether anybody looks on at a call. Where not, it may go past torch's dispatcher, which costs as much as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

PLAIN = (Tensor, nn.Parameter)


def is_watched() -> bool:
    """Something traces, counts, transforms or compiles."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or any(map(_watches, range(torch._C._len_torch_function_stack())))
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _watches(place: int) -> bool:
    """What ``torch.set_default_device`` puts on the stack only looks at calls that make tensors."""
    return not isinstance(torch._C._get_function_stack_at(place), DeviceContext)


def are_plain(*tensors: Tensor | None) -> bool:
    """No subclasses, whose numbers may be elsewhere."""
    return all(t is None or type(t) in PLAIN for t in tensors)
