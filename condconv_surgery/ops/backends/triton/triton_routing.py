"""Routers on a GPU: pooling in one pass, and where nothing is recorded the whole map from features to a mixture in one
launch, for which torch takes three operators (CondConv) or ten (ODConv).

All give None where torch is to do it, as those of ``ops.backends.cpp.cpp_routing`` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.ops.backends.triton.availability import MOST_SAMPLES, room, takes
from condconv_surgery.ops.backends.triton.triton_convolution import MOST_EXPERTS
from condconv_surgery.ops.tracing_state import are_plain, is_watched, linear_parts, norm_parts

MOST_HIDDEN = 256
"""Numbers of a hidden vector: more of them at a time need more shared memory than a multiprocessor has."""


def pool(x: Tensor) -> Tensor | None:
    """The mean over positions in float32, [B, I, H, W] -> [B, I]."""
    if not takes(x) or is_watched() or not are_plain(x):
        return None
    if not x.numel() or x.shape[0] > MOST_SAMPLES:
        return None
    pooled: Tensor = _Mean.apply(x) if torch.is_grad_enabled() else room("pooling_kernels").mean(x)
    return pooled


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        pooled: Tensor = room("pooling_kernels").mean(x)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # divided before it is spread: nothing of the size of ``x`` is written
        scaled: Tensor = (grad / (ctx.shape[2] * ctx.shape[3])).to(ctx.dtype)
        return scaled[:, :, None, None].expand(ctx.shape)


def sigmoid_gates(pooled: Tensor, linear: nn.Module, factor: float) -> Tensor | None:
    """``factor * sigmoid(linear(pooled))``: [B, I] -> [B, E]."""
    if not _reads(pooled):
        return None
    parts = linear_parts(linear)
    if parts is None or not _fit(pooled, *parts) or parts[0].shape[1] != pooled.shape[1]:
        return None
    if parts[0].shape[0] > MOST_EXPERTS:
        return None
    gates: Tensor = room("router_kernels").sigmoid_gates(pooled, parts, factor)
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

    [B, I] -> [B, width of the head] for each of up to four, None where there is none. norm: only in eval mode.
    """
    if not _reads(pooled) or not are_plain(temperature) or temperature.device != pooled.device:
        return None
    statistics, hidden = [] if norm is None else norm_parts(norm), linear_parts(reduce)
    if statistics is None or hidden is None or not _fit(pooled, *statistics, *hidden):
        return None
    width, channels = hidden[0].shape
    if channels != pooled.shape[1] or any(len(part) != width for part in statistics):
        return None
    maps = [None if head is None else _map_of(head, pooled, width) for head in heads]
    if any(head is not None and parts is None for head, parts in zip(heads, maps, strict=True)):
        return None
    if width > MOST_HIDDEN or (maps[-1] is not None and len(maps[-1][0]) > MOST_EXPERTS):
        return None
    maps[:0] = [None] * (4 - len(maps))
    eps = 0.0 if norm is None else norm.eps
    found: list[Tensor | None] = room("router_kernels").attention(
        pooled, hidden, statistics, eps, relu, maps, temperature
    )
    return found[-len(heads) :]


def _map_of(linear: nn.Linear, pooled: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a map of ``width`` numbers, where it has both, and both are like ``pooled``."""
    weight, bias = linear_parts(linear) or (None, None)
    if weight is None or bias is None or weight.shape[1] != width or not _fit(pooled, weight, bias):
        return None
    return weight, bias


def _reads(pooled: Tensor) -> bool:
    """Triton can be called on ``pooled`` [B, I], and nobody would miss the call that it replaces."""
    if torch.is_grad_enabled() or not takes(pooled):
        return False
    if is_watched() or not are_plain(pooled):  # the batch may be symbolic
        return False
    return pooled.dim() == 2 and 0 < pooled.shape[0] <= MOST_SAMPLES and pooled.stride(1) == 1


def _fit(pooled: Tensor, *parts: Tensor | None) -> bool:
    """As torch would have them: of one dtype and on one device."""
    return all(
        part is None or (part.dtype == pooled.dtype and part.device == pooled.device and part.is_contiguous())
        for part in parts
    )
