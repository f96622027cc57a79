"""Whether anybody looks on at a call. Where not, it may go past torch's dispatcher, which costs as much as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
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


def linear_parts(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of an ``nn.Linear`` that nothing wraps and to whose calls nobody listens."""
    if type(linear) is not nn.Linear or _is_listened_to(linear):
        return None
    parts = linear._parameters  # looking them up as attributes takes longer than the map
    if "weight" not in parts or "bias" not in parts:  # replicated or sharded: they are attributes of another kind
        return None
    weight, bias = parts["weight"], parts["bias"]
    return None if weight is None or not are_plain(weight, bias) else (weight, bias)


def norm_parts(norm: nn.Module) -> list[Tensor] | None:
    """Running mean and variance, weight and bias of a batch norm in eval mode, likewise."""
    if type(norm) is not nn.BatchNorm1d or norm.training or _is_listened_to(norm):
        return None
    parts = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    present = [part for part in parts if part is not None]
    return present if len(present) == len(parts) and are_plain(*present) else None


def _is_listened_to(module: nn.Module) -> bool:
    """Something hears of its calls, or has taken their place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()  # type: ignore[no-untyped-call]
    return bool(hooks or "forward" in vars(module))
