"""Routers by the compiled code, each in one call where torch takes five operators (CondConv) or fifteen (ODConv).

All give None where torch's own operators are to do it: the compiled code is not in use or may not be called, or
something is not contiguous, in float32 and on the CPU, or not an ``nn.Linear`` or ``nn.BatchNorm1d`` and no more.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from condconv_surgery.layers.native.calls import code_for
from condconv_surgery.layers.watching import are_plain


def pool(x: Tensor) -> Tensor | None:
    """The mean over positions, [B, I, H, W] -> [B, I]."""
    code = code_for(x)
    pooled: Tensor | None = None if code is None else code.pool(x)
    return pooled


def sigmoid_gates(pooled: Tensor, linear: nn.Module, factor: float) -> Tensor | None:
    """``factor * sigmoid(linear(pooled))``: [B, I] -> [B, E]."""
    code = code_for(pooled)
    parts = None if code is None else _parts(linear)
    gates: Tensor | None = None if parts is None else code.sigmoid_gates(pooled, *parts, factor)
    return gates


def attention(
    pooled: Tensor,
    reduce: nn.Linear,
    norm: nn.BatchNorm1d | None,
    relu: bool,
    heads: Sequence[nn.Linear | None],
    temperature: Tensor,
) -> list[Tensor | None] | None:
    """``2 sigmoid(head(h) / T)``, for the last head ``softmax(head(h) / T)``, with ``h = relu(norm(reduce(pooled)))``.

    [B, I] -> [B, width of the head] for each, None where there is none. norm: only in eval mode.
    """
    code = code_for(pooled, temperature)
    if code is None:
        return None
    statistics = [] if norm is None else _statistics(norm)
    maps = [_parts(linear) for linear in (reduce, *heads) if linear is not None]
    if statistics is None or None in maps:
        return None
    weight, bias = maps.pop(0)  # type: ignore[misc]
    given = [None if head is None else maps.pop(0) for head in heads]
    eps = 0.0 if norm is None else norm.eps
    found: list[Tensor | None] | None = code.attention(pooled, weight, bias, statistics, eps, relu, given, temperature)
    return found


def _parts(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of an ``nn.Linear`` that nothing wraps and to whose calls nobody listens."""
    if type(linear) is not nn.Linear or _is_listened_to(linear):
        return None
    parts = linear._parameters  # looking them up as attributes takes longer than the map
    if "weight" not in parts or "bias" not in parts:  # replicated or sharded: they are attributes of another kind
        return None
    weight, bias = parts["weight"], parts["bias"]
    return None if weight is None or not are_plain(weight, bias) else (weight, bias)


def _statistics(norm: nn.Module) -> list[Tensor] | None:
    """Running mean and variance, weight and bias of a batch norm in eval mode."""
    if type(norm) is not nn.BatchNorm1d or norm.training or _is_listened_to(norm):
        return None
    parts = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    present = [part for part in parts if part is not None]
    return present if len(present) == len(parts) and are_plain(*present) else None


def _is_listened_to(module: nn.Module) -> bool:
    """Something hears of its calls, or has taken their place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()  # type: ignore[no-untyped-call]
    return bool(hooks or "forward" in vars(module))
