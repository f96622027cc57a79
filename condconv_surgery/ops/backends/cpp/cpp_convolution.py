"""Convolutions by the compiled code: which ones it supports, their values and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condconv_surgery.ops.backends.cpp.compile import extension
from condconv_surgery.ops.backends.cpp.cpp_eligibility import code_for
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_experts, unmix_kernels
from condconv_surgery.ops.per_sample.per_sample_conv import format_of

MAX_TAPS = 81
"""Positions of a kernel. The compiled code mixes all positions of a channel at a time, for a dense layer in part of the
first level of cache, and sums the gradients of the positions in a buffer for each such part."""

MAX_POINTWISE_POSITIONS = 200
"""Up to this many output positions a 1x1 layer is faster here than as a batched matrix product: 1.6 to 1.9 against 2.1
to 2.5 of static at 7 px, 0.8 to 1.1 against 1.0 to 1.3 at 14 px, but 0.6 against 0.5 at 28 px (512 channels)."""


def supports(x: Tensor, experts: Tensor, geometry: ConvGeometry | ConvArguments) -> bool:
    """Whether the compiled code is enabled and supports ``x`` [B, I, H, W], padded or not, and ``experts``.

    The batch is compared only with 1, so that one compiled graph serves every batch.
    """
    if extension() is None or not x.is_cpu or not experts.is_cpu:
        return False
    if x.dtype != torch.float32 or experts.dtype != torch.float32 or format_of(x) != torch.contiguous_format:
        return False
    batch, channels, height, width = x.shape
    _, filters, _, kh, kw = experts.shape
    if geometry.groups != 1:
        return bool(geometry.groups == channels == filters and kh * kw <= MAX_TAPS)
    if kh * kw > 1:
        return bool(kh * kw <= MAX_TAPS)
    positions = height // geometry.stride[0] * (width // geometry.stride[1])
    return bool(batch == 1 or positions <= MAX_POINTWISE_POSITIONS)


def fast_convolve(
    implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry
) -> Tensor | None:
    """``convolve`` past torch's dispatcher, or None where that is not possible.

    It is taken before the choice: what is supported is always computed blockwise, except for scales alone.
    """
    if implementation != "auto" or code_for(x, experts, *mixture) is None or torch.is_autocast_enabled("cpu"):
        return None
    batch = x.shape[0]
    if batch == 0 or not supports(x, experts, geometry):
        return None
    if mixture.gate is None and mixture.spatial is None and (batch > 1 or all(part is None for part in mixture)):
        return None  # scales alone may be cheaper on the activations
    return convolve(*geometry.pad(x), experts, mixture)


def convolve(x: Tensor, arguments: ConvArguments, experts: Tensor, mixture: Mixture) -> Tensor:
    """``out_scale_b * conv(in_scale_b * x_b, K_b)``, [B, I, H, W] -> [B, O, H', W'], without autograd."""
    code, (stride, padding, dilation, groups) = extension(), arguments
    function = code.convolve if groups == 1 else code.depthwise_convolve
    y: Tensor = function(x.contiguous(), *_parts(experts, mixture), stride, padding, dilation)
    return y


def convolve_backward(
    grad: Tensor, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments, needs: list[bool]
) -> list[Tensor | None]:
    """The gradients of ``x``, the experts and the parts of the mixture, in this order.

    needs: which of them are asked for; the others may be None.
    """
    code, parts, (*shape, groups) = extension(), _parts(experts, mixture), arguments
    grad, x = grad.contiguous(), x.contiguous()
    if groups == 1:
        to_x = code.input_gradient(grad, x, *parts, *shape) if needs[0] else None
        return [to_x, *(code.kernel_gradients(grad, x, *parts, *shape) if any(needs[1:]) else [None] * 5)]
    to_x = code.depthwise_input_gradient(grad, x, *parts, *shape) if needs[0] else None
    if not any(needs[1:]):
        return [to_x] + [None] * 5
    weight, mixture = parts[0], Mixture(*parts[1:])
    to_kernels = code.depthwise_kernel_gradient(grad, x, weight, *shape)  # small: torch's operators do the rest
    to_experts = torch.zeros_like(weight) if needs[1] else None
    mixed = mix_experts(weight, mixture.gate)
    return [to_x, to_experts, *unmix_kernels(to_kernels, mixed, weight, mixture, groups, to_experts)]


def _parts(experts: Tensor, mixture: Mixture) -> list[Any]:
    """The experts and the parts of the mixture as the compiled code reads them: contiguous, in float32."""
    return [part if part is None or _is_ready(part) else _made_ready(part) for part in (experts, *mixture)]


def _is_ready(part: Tensor) -> bool:
    return part.dtype is torch.float32 and part.is_contiguous()


def _made_ready(part: Tensor) -> Tensor:
    return part.detach().to(torch.float32).contiguous()
