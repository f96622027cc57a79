"""Past torch's dispatcher: the operator of ``blockwise`` as a ``torch.autograd.Function``, a single kernel.

Without the checks and the bookkeeping of an operator, which cost as much as a small layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condconv_surgery.ops.backends.triton.triton_convolution import convolve, convolve_backward, fits, kernel_of_one
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.mix_kernels import empty_gradients
from condconv_surgery.ops.implementations.per_sample_conv import format_of
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.tracing_state import are_plain, is_watched


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


def kernel_at_once(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor | None:
    """The kernel of a batch of one, [O, I/G, kh, kw], or None where torch is to mix it. ``x`` is padded already.

    Of a dense layer only where it comes in the layout in which torch's convolution reads it.
    """
    return kernel_of_one(x, experts, mixture) if scales_on_the_way("plain", x, experts, mixture, geometry) else None


def scales_on_the_way(way: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> bool:
    """Whether ``way`` has its kernels mixed here and nothing is recorded, so that to scale them too costs nothing."""
    if torch.is_grad_enabled() or not fits(x, experts, mixture, geometry.stride, geometry.dilation, geometry.groups):
        return False
    if way == "blocks":
        return True
    if geometry.groups == 1 and not geometry.pointwise and format_of(x) != torch.channels_last:
        return False
    return way == "plain" and not is_watched() and are_plain(x, experts, *mixture)


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
