"""Past torch's dispatcher: ``blockwise`` as a ``torch.autograd.Function``, and the kernel of a batch of one.

Without the checks and the bookkeeping of a custom operator, which cost as much as a small layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.backends.triton.triton_convolution import convolve, convolve_backward, kernel_of_one, supports
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import empty_gradients
from condconv_surgery.ops.per_sample.per_sample_conv import format_of
from condconv_surgery.ops.per_sample.second_order import needs_recording, recorded_gradients
from condconv_surgery.ops.tracing_state import are_plain, is_intercepted


def fast_convolve(
    implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry
) -> Tensor | None:
    """``conv(x_b, K_b)`` for ``x`` [B, I, H, W] by an implementation, or None."""
    if implementation == "blockwise":
        return _blockwise(x, experts, mixture, geometry)
    kernel = mixed_kernel(x, experts, mixture, geometry) if implementation == "plain" else None
    if kernel is None:
        return None
    x, arguments = geometry.pad(x)
    return F.conv2d(x, kernel, None, *arguments)


def _blockwise(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor | None:
    """``conv(x_b, K_b)`` for ``x`` [B, I, H, W], or None where the custom operator has to compute it."""
    if not supports(x, experts, mixture, geometry) or is_intercepted() or not are_plain(x, experts, *mixture):
        return None
    x, arguments = geometry.pad(x)
    if not torch.is_grad_enabled():
        return convolve(x, experts, mixture, arguments)
    y: Tensor = _Convolution.apply(x, experts, *mixture, arguments)
    return y


def mixed_kernel(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor | None:
    """The kernel of a batch of one, [O, I/G, kh, kw], or None where torch has to mix it.

    For a dense layer only where the kernel gets the layout in which torch's convolution reads it.
    """
    return kernel_of_one(x, experts, mixture) if applies_scales("plain", x, experts, mixture, geometry) else None


def applies_scales(implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> bool:
    """Whether Triton mixes these kernels without autograd, so that scaling them too costs nothing."""
    if torch.is_grad_enabled() or not supports(x, experts, mixture, geometry):
        return False
    if implementation == "blockwise":
        return True
    if geometry.groups == 1 and not geometry.pointwise and format_of(x) != torch.channels_last:
        return False
    return implementation == "plain" and not is_intercepted() and are_plain(x, experts, *mixture)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.arguments = inputs
        x, experts, *parts = tensors
        # as many tensors as the operator saves, so that a checkpoint may recompute by the other path
        ctx.save_for_backward(x.new_empty(0), *tensors)
        return convolve(x, experts, Mixture(*parts), ctx.arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, x, experts, *parts = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:6])
        if needs_recording(grad):
            return (*recorded_gradients(grad, (x, experts, *parts), ctx.arguments, needs), None)
        mixture = Mixture(*parts)
        out = empty_gradients(x, experts, mixture)
        grads = convolve_backward(grad, x, experts, mixture, ctx.arguments, out, needs)
        with_needs = zip(grads, needs, (x, experts, *parts), strict=True)
        return (*(g if n and t is not None else None for g, n, t in with_needs), None)
