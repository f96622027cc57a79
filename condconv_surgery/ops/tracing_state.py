"""Is a call traced, compiled or intercepted? If not, a fast path may skip torch's dispatcher.

torch has no public question for most of this. Where a version lacks one of its private functions, the answer is the
careful one: intercepted, hooked, no fast path.
"""

from __future__ import annotations

import torch
import torch.utils._device
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN_TYPES = (Tensor, nn.Parameter)


def is_intercepted() -> bool:
    """Whether something traces, counts, transforms or compiles."""
    if torch.compiler.is_compiling():
        return True
    try:
        return bool(
            torch._C._get_tracing_state() is not None
            or torch._C._len_torch_dispatch_stack()
            or ((modes := torch._C._len_torch_function_stack()) and any(map(_is_intercepting, range(modes))))
            or is_transformed()
        )
    except AttributeError:
        return True


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation transforms calls. They have rules for torch's operators
    alone: of any other they raise an error, or lose the tangent. ``torch.compile`` can trace the question."""
    try:
        return bool(torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    except AttributeError:
        return True


def is_batch_of_gradients(grad: Tensor) -> bool:
    """Whether ``is_grads_batched=True`` computes, by a ``vmap`` that is older than that of ``torch.func``."""
    try:
        return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)
    except AttributeError:
        return True


def is_exporting() -> bool:
    """Whether ``torch.export`` traces."""
    # torch.compile of torch 2.10 takes torch.compiler.is_exporting() as true
    return torch.compiler.is_exporting() and bool(getattr(torch.compiler, "_is_exporting_flag", True))


def is_exporting_to_onnx() -> bool:
    """Whether ``torch.onnx.export`` traces through ``torch.export``."""
    return is_exporting() and torch.onnx.is_in_onnx_export()


def is_jit_traced() -> bool:
    """Whether ``torch.jit.trace`` records, or an exporter that is built on it: sizes become part of the program only
    as arguments of operators, and what Python decides by them is decided for every later call."""
    return not torch.compiler.is_compiling() and bool(torch._C._is_tracing())


def _is_intercepting(position: int) -> bool:
    """Whether a mode sees our operators. That of ``torch.set_default_device`` changes only calls that make tensors."""
    return not isinstance(torch._C._get_function_stack_at(position), torch.utils._device.DeviceContext)


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether none is of a subclass, which may hold its data elsewhere."""
    for t in tensors:  # noqa: SIM110  a generator takes as long as the checks
        if t is not None and type(t) not in PLAIN_TYPES:
            return False
    return True


def linear_parts(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of an ``nn.Linear``; None where it has hooks, is wrapped or is of another class."""
    if type(linear) is not nn.Linear or is_hooked(linear):
        return None
    parts = linear._parameters  # an attribute lookup takes longer than the linear map
    if "bias" not in parts:  # replicated or sharded: not parameters but plain attributes
        return None
    weight, bias = parts.get("weight"), parts["bias"]
    if type(weight) not in PLAIN_TYPES or (bias is not None and type(bias) not in PLAIN_TYPES):
        return None
    return weight, bias  # type: ignore[return-value]


def norm_parts(norm: nn.Module) -> list[Tensor] | None:
    """Running mean and variance, weight and bias of an ``nn.BatchNorm1d`` in eval mode; else None."""
    if type(norm) is not nn.BatchNorm1d or norm.training or is_hooked(norm):
        return None
    buffers, parameters = norm._buffers, norm._parameters
    parts = [buffers.get("running_mean"), buffers.get("running_var"), parameters.get("weight"), parameters.get("bias")]
    for part in parts:
        if type(part) not in PLAIN_TYPES:
            return None
    return parts  # type: ignore[return-value]


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks see its calls, or its ``forward`` or a router's ``mix`` was replaced on the instance."""
    own = module.__dict__  # asked for each map of a router at each call: attributes and ``any`` take twice as long
    try:
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
        return "forward" in own or "mix" in own or bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]
    except (AttributeError, KeyError):
        return True
