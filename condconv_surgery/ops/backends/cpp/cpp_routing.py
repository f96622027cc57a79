"""Routers by the compiled code, each in one call where torch takes five operators (CondConv) or fifteen (ODConv).

All give None where torch's own operators are to do it: the compiled code is not in use or may not be called, or
something is not contiguous, in float32 and on the CPU, or not an ``nn.Linear`` or ``nn.BatchNorm1d`` and no more.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from condconv_surgery.ops.backends.cpp.cpp_eligibility import code_for
from condconv_surgery.ops.tracing_state import linear_parts, norm_parts


def pool(x: Tensor) -> Tensor | None:
    """The mean over positions, [B, I, H, W] -> [B, I]."""
    code = code_for(x)
    pooled: Tensor | None = None if code is None else code.pool(x)
    return pooled


def sigmoid_gates(pooled: Tensor, linear: nn.Module, factor: float) -> Tensor | None:
    """``factor * sigmoid(linear(pooled))``: [B, I] -> [B, E]."""
    code = code_for(pooled)
    parts = None if code is None else linear_parts(linear)
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
    statistics = [] if norm is None else norm_parts(norm)
    maps = [linear_parts(linear) for linear in (reduce, *heads) if linear is not None]
    if statistics is None or None in maps:
        return None
    weight, bias = maps.pop(0)  # type: ignore[misc]
    given = [None if head is None else maps.pop(0) for head in heads]
    eps = 0.0 if norm is None else norm.eps
    found: list[Tensor | None] | None = code.attention(pooled, weight, bias, statistics, eps, relu, given, temperature)
    return found
