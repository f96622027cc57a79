"""Values and gradients by ``torch.autograd.Function``: pooling, and a convolution past torch's dispatcher.

The latter is the operator of ``layers.blocks`` without the checks and the bookkeeping of an operator, which cost as
much as a small layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condconv_surgery.layers.gpu.convolution import (
    MOST_SAMPLES,
    convolve,
    convolve_backward,
    fits,
    room,
    takes,
)
from condconv_surgery.layers.kernels import empty_gradients
from condconv_surgery.layers.mixture import ConvGeometry, Mixture
from condconv_surgery.layers.watching import are_plain, is_watched


def convolve_at_once(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor | None:
    """``conv(x_b, K_b)`` for ``x`` [B, I, H, W], or None where the operator is to do it, which more can look into."""
    if not fits(x, experts, mixture, geometry.stride, geometry.dilation, geometry.groups):
        return None
    if is_watched() or not are_plain(x, experts, *mixture):
        return None
    x, padding = geometry.pad(x)
    shape = (list(geometry.stride), list(padding), list(geometry.dilation))
    if not torch.is_grad_enabled():
        return convolve(x, experts, mixture, *shape)
    y: Tensor = _Convolution.apply(x, experts, *mixture, (*shape, geometry.groups))
    return y


def pool(x: Tensor) -> Tensor | None:
    """The mean over positions in float32, [B, I, H, W] -> [B, I], or None where torch is to do it."""
    if not takes(x) or is_watched() or not are_plain(x):
        return None
    if not x.numel() or x.shape[0] > MOST_SAMPLES:
        return None
    pooled: Tensor = _Mean.apply(x) if torch.is_grad_enabled() else room("pooling").mean(x)
    return pooled


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        pooled: Tensor = room("pooling").mean(x)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # divided before it is spread: nothing of the size of ``x`` is written
        scaled: Tensor = (grad / (ctx.shape[2] * ctx.shape[3])).to(ctx.dtype)
        return scaled[:, :, None, None].expand(ctx.shape)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *tensors, ctx.shape = given
        x, experts, *parts = tensors
        ctx.save_for_backward(x.new_empty(0), *tensors)  # as many as the operator, so that a checkpoint may mix them
        return convolve(x, experts, Mixture(*parts), *ctx.shape[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, x, experts, *parts = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:6])
        if torch.is_grad_enabled():  # to be differentiated again: the operator says that it cannot be
            operator = torch.ops.condconv_surgery.convolve_in_blocks_backward
            grads = operator(grad, kept, x, experts, *parts, *ctx.shape, needs)
        else:
            stride, padding, dilation, _ = ctx.shape
            mixture = Mixture(*parts)
            grads = empty_gradients(x, experts, mixture)
            convolve_backward(grad, x, experts, mixture, grads, stride, padding, dilation, needs)
        wanted = zip(grads, needs, (x, experts, *parts), strict=True)
        return (*(g if n and t is not None else None for g, n, t in wanted), None)
