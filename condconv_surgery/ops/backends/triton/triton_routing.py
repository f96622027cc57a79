"""Routers on a GPU: pooling in one pass, and where autograd records nothing the whole map from features to a mixture in
one launch, for which torch takes three operators (CondConv) or ten (ODConv).

All return None where torch has to compute them, as those of ``ops.backends.cpp.cpp_routing`` do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.ops.backends.triton.availability import MAX_SAMPLES, kernels, supports_tensor
from condconv_surgery.ops.backends.triton.triton_convolution import MAX_EXPERTS
from condconv_surgery.ops.router_forms import Attention, RouterForm, SigmoidGates
from condconv_surgery.ops.tracing_state import are_plain, is_intercepted, linear_parts, norm_parts

MAX_HIDDEN = 256
"""Elements of a hidden vector: more at a time need more shared memory than a multiprocessor has."""


def pool(x: Tensor) -> Tensor | None:
    """The mean over positions in float32, [B, I, H, W] -> [B, I]."""
    if not supports_tensor(x) or is_intercepted() or not are_plain(x):
        return None
    if not x.numel() or x.shape[0] > MAX_SAMPLES:
        return None
    pooled: Tensor = _Mean.apply(x) if torch.is_grad_enabled() else kernels("pooling_kernels").mean(x)
    return pooled


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        pooled: Tensor = kernels("pooling_kernels").mean(x)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # divide before expanding: nothing of the size of ``x`` is written
        scaled: Tensor = (grad / (ctx.shape[2] * ctx.shape[3])).to(ctx.dtype)
        return scaled[:, :, None, None].expand(ctx.shape)


def route(pooled: Tensor, form: RouterForm) -> list[Tensor | None] | None:
    """The outputs of a router, [B, I] -> [B, E] or [B, width of the head] each."""
    if not _supports_pooled(pooled):
        return None
    if not isinstance(form, SigmoidGates):
        return attention(pooled, form)
    gates = sigmoid_gates(pooled, form)
    return None if gates is None else [gates]


def sigmoid_gates(pooled: Tensor, form: SigmoidGates) -> Tensor | None:
    """``factor * sigmoid(linear(pooled))``: [B, I] -> [B, E]."""
    parts = linear_parts(form.linear)
    if parts is None or not _alike(pooled, *parts) or parts[0].shape[1] != pooled.shape[1]:
        return None
    if parts[0].shape[0] > MAX_EXPERTS:
        return None
    gates: Tensor = kernels("router_kernels").sigmoid_gates(pooled, parts, form.factor)
    return gates


def attention(pooled: Tensor, form: Attention) -> list[Tensor | None] | None:
    """The outputs of up to four heads (``router_forms.Attention``), [B, I] -> [B, width of the head] each."""
    reduce, norm, relu, heads, temperature = form
    if not are_plain(temperature) or temperature.device != pooled.device:
        return None
    statistics, hidden = [] if norm is None else norm_parts(norm), linear_parts(reduce)
    if statistics is None or hidden is None or not _alike(pooled, *statistics, *hidden):
        return None
    width, channels = hidden[0].shape
    if channels != pooled.shape[1] or any(len(part) != width for part in statistics):
        return None
    maps = [None if head is None else _map_of(head, pooled, width) for head in heads]
    if any(head is not None and parts is None for head, parts in zip(heads, maps, strict=True)):
        return None
    if width > MAX_HIDDEN or (maps[-1] is not None and len(maps[-1][0]) > MAX_EXPERTS):
        return None
    maps[:0] = [None] * (4 - len(maps))
    eps = 0.0 if norm is None else norm.eps
    outputs: list[Tensor | None] = kernels("router_kernels").attention(
        pooled, hidden, statistics, eps, relu, maps, temperature
    )
    return outputs[-len(heads) :]


def _map_of(linear: nn.Module, pooled: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a linear map of ``width`` inputs; None unless it has both and both are like ``pooled``."""
    weight, bias = linear_parts(linear) or (None, None)
    if weight is None or bias is None or weight.shape[1] != width or not _alike(pooled, weight, bias):
        return None
    return weight, bias


def _supports_pooled(pooled: Tensor) -> bool:
    """Whether Triton supports ``pooled`` [B, I], and the call is not traced, compiled or intercepted."""
    if torch.is_grad_enabled() or not supports_tensor(pooled):
        return False
    if is_intercepted() or not are_plain(pooled):  # the batch may be symbolic
        return False
    return pooled.dim() == 2 and 0 < pooled.shape[0] <= MAX_SAMPLES and pooled.stride(1) == 1


def _alike(pooled: Tensor, *parts: Tensor | None) -> bool:
    """Whether all have one dtype and one device, as torch requires, and are contiguous."""
    return all(
        part is None or (part.dtype == pooled.dtype and part.device == pooled.device and part.is_contiguous())
        for part in parts
    )
