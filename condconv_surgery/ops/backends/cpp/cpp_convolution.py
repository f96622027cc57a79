"""Convolutions by the compiled code: which it takes, and their values and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from condconv_surgery.ops.backends.cpp.compile import extension
from condconv_surgery.ops.backends.cpp.cpp_eligibility import code_for
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.mix_kernels import mix_experts, unmix_kernels
from condconv_surgery.ops.implementations.per_sample_conv import format_of
from condconv_surgery.ops.mixture import Mixture

MOST_TAPS = 81
"""Positions of a kernel: the compiled code mixes all of a channel at a time, for a dense layer in a part of the first
level of cache, and adds up the gradients of the positions in memory of its own for each such part."""

FEW_POSITIONS = 200
"""Up to so many output positions a 1x1 layer is faster here than as a batched matrix product: 1.6 to 1.9 against 2.1 to
2.5 of static at 7 px, 0.8 to 1.1 against 1.0 to 1.3 at 14 px, but 0.6 against 0.5 at 28 px (512 channels)."""


def fits(x: Tensor, experts: Tensor, stride: tuple[int, int] | list[int], groups: int) -> bool:
    """Whether the compiled code is in use and takes ``x`` [B, I, H, W], padded or not, and ``experts``.

    Never a comparison of the batch with anything but 1, so that one compiled graph serves every batch.
    """
    if extension() is None or not x.is_cpu or not experts.is_cpu:
        return False
    if x.dtype != torch.float32 or experts.dtype != torch.float32 or format_of(x) != torch.contiguous_format:
        return False
    batch, channels, height, width = x.shape
    _, filters, _, kh, kw = experts.shape
    if groups != 1:
        return bool(groups == channels == filters and kh * kw <= MOST_TAPS)
    if kh * kw > 1:
        return bool(kh * kw <= MOST_TAPS)
    return bool(batch == 1 or height // stride[0] * (width // stride[1]) <= FEW_POSITIONS)


def convolve_at_once(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor | None:
    """``convolve`` past the dispatcher and the choice of a way, or None where that is not to be."""
    if code_for(x, experts, *mixture) is None or torch.is_autocast_enabled("cpu"):
        return None
    batch = x.shape[0]
    if batch == 0 or not fits(x, experts, geometry.stride, geometry.groups):
        return None
    if mixture.gate is None and mixture.spatial is None and (batch > 1 or all(part is None for part in mixture)):
        return None  # scales alone may be cheaper on the activations
    x, padding = geometry.pad(x)
    return convolve(x, experts, mixture, geometry.stride, padding, geometry.dilation, geometry.groups)


def convolve(
    x: Tensor,
    experts: Tensor,
    mixture: Mixture,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``out_scale_b * conv(in_scale_b * x_b, K_b)``, [B, I, H, W] -> [B, O, H', W'], without autograd."""
    given = (x.contiguous(), *_parts(experts, mixture), stride, padding, dilation)
    code = extension()
    y: Tensor = code.convolve(*given) if groups == 1 else code.depthwise_convolve(*given)
    return y


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    mixture: Mixture,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> list[Tensor | None]:
    """The gradients of ``x``, the experts and the parts of the mixture, in this order.

    needs: of these, which are asked for; the others may be None.
    """
    code, parts, shape = extension(), _parts(experts, mixture), (stride, padding, dilation)
    grad, x = grad.contiguous(), x.contiguous()
    if groups == 1:
        to_x = code.input_gradient(grad, x, *parts, *shape) if needs[0] else None
        return [to_x, *(code.kernel_gradients(grad, x, *parts, *shape) if any(needs[1:]) else [None] * 5)]
    to_x = code.depthwise_input_gradient(grad, x, *parts, *shape) if needs[0] else None
    if not any(needs[1:]):
        return [to_x] + [None] * 5
    weight, mixture = parts[0], Mixture(*parts[1:])
    to_kernels = code.depthwise_kernel_gradient(grad, x, weight, *shape)  # few numbers: torch's operators do the rest
    to_experts = torch.zeros_like(weight) if needs[1] else None
    mixed = mix_experts(weight, mixture.gate)
    return [to_x, to_experts, *unmix_kernels(to_kernels, mixed, weight, mixture, groups, to_experts)]


def _parts(experts: Tensor, mixture: Mixture) -> list[Any]:
    """The experts and the parts of the mixture as the compiled code takes them."""
    return [part if part is None or _is_ready(part) else _made_ready(part) for part in (experts, *mixture)]


def _is_ready(part: Tensor) -> bool:
    return part.dtype is torch.float32 and part.is_contiguous()


def _made_ready(part: Tensor) -> Tensor:
    return part.detach().to(torch.float32).contiguous()
