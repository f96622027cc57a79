"""Routers by the compiled code, each in one call where torch takes five operators (CondConv) or fifteen (ODConv).

All return None where torch has to compute them: the compiled code is not enabled or may not be called, a tensor is not
contiguous, in float32 and on the CPU, or a module is not exactly an ``nn.Linear`` or ``nn.BatchNorm1d`` without hooks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from condconv_surgery.ops.backends.cpp.cpp_eligibility import kernels_for
from condconv_surgery.ops.router_forms import Attention, RouterForm, SigmoidGates
from condconv_surgery.ops.tracing_state import linear_parts, norm_parts

HEADS = 4
"""Of an attention in the compiled code: of in_scale, out_scale, spatial and gate."""


def pool(x: Tensor) -> Tensor | None:
    """The mean over positions, [B, I, H, W] -> [B, I]."""
    code = kernels_for(x)
    pooled: Tensor | None = None if code is None else code.pool(x)
    return pooled


def route(pooled: Tensor, form: RouterForm) -> list[Tensor | None] | None:
    """The outputs of a router, [B, I] -> [B, E] or [B, width of the head] each."""
    if not isinstance(form, SigmoidGates):
        return _attention(pooled, form)
    code = kernels_for(pooled)
    parts = None if code is None else linear_parts(form.linear)
    gates = None if parts is None else code.sigmoid_gates(pooled, *parts, form.factor)
    return None if gates is None else [gates]


def _attention(pooled: Tensor, form: Attention) -> list[Tensor | None] | None:
    code = kernels_for(pooled, form.temperature)
    arguments = None if code is None or len(form.heads) > HEADS else attention_arguments(form)
    found = arguments and code.attention(pooled, *arguments)
    if not found:
        return None
    outputs = iter(found)
    return [None if head is None else next(outputs) for head in form.heads]


def attention_arguments(form: Attention) -> tuple[Any, ...] | None:
    """What the compiled code takes of ``form`` with up to ``HEADS`` heads, the last ones; None where it cannot.

    The last two are the weights and biases of the heads that are present, and the bits of which these are.
    """
    reduce, norm, relu, heads, temperature = form
    statistics = [] if norm is None else norm_parts(norm)
    hidden = linear_parts(reduce)
    if statistics is None or hidden is None:
        return None
    maps: list[Any] = []
    present, bit = 0, 1 << HEADS - len(heads)
    for head in heads:
        if head is not None:
            parts = linear_parts(head)
            if parts is None or parts[1] is None:
                return None
            maps += parts
            present += bit
        bit += bit
    reduced = hidden[:1] if hidden[1] is None else hidden
    return reduced, statistics, 0.0 if norm is None else norm.eps, relu, temperature, maps, present
