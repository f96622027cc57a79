"""Routers by the compiled code, each in one call where torch takes five operators (CondConv) or fifteen (ODConv).

All return None where torch has to compute them: the compiled code is not enabled or may not be called, a tensor is not
contiguous, in float32 and on the CPU, or a module is not exactly an ``nn.Linear`` or ``nn.BatchNorm1d`` without hooks.
"""

from __future__ import annotations

from torch import Tensor

from condconv_surgery.ops.backends.cpp.cpp_eligibility import code_for
from condconv_surgery.ops.router_forms import Attention, RouterForm, SigmoidGates
from condconv_surgery.ops.tracing_state import linear_parts, norm_parts


def pool(x: Tensor) -> Tensor | None:
    """The mean over positions, [B, I, H, W] -> [B, I]."""
    code = code_for(x)
    pooled: Tensor | None = None if code is None else code.pool(x)
    return pooled


def route(pooled: Tensor, form: RouterForm) -> list[Tensor | None] | None:
    """The outputs of a router, [B, I] -> [B, E] or [B, width of the head] each."""
    if not isinstance(form, SigmoidGates):
        return _attention(pooled, form)
    code = code_for(pooled)
    parts = None if code is None else linear_parts(form.linear)
    gates = None if parts is None else code.sigmoid_gates(pooled, *parts, form.factor)
    return None if gates is None else [gates]


def _attention(pooled: Tensor, form: Attention) -> list[Tensor | None] | None:
    reduce, norm, relu, heads, temperature = form
    code = code_for(pooled, temperature)
    if code is None:
        return None
    statistics = [] if norm is None else norm_parts(norm)
    maps = [linear_parts(linear) for linear in (reduce, *heads) if linear is not None]
    if statistics is None or None in maps:
        return None
    weight, bias = maps.pop(0)  # type: ignore[misc]
    present = [None if head is None else maps.pop(0) for head in heads]
    eps = 0.0 if norm is None else norm.eps
    return code.attention(pooled, weight, bias, statistics, eps, relu, present, temperature)  # type: ignore[no-any-return]
