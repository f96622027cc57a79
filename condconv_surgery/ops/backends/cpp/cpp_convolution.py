"""Convolutions by the compiled code: which ones it supports, their values and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from condconv_surgery.ops.backends.cpp.cpp_eligibility import kernels_for
from condconv_surgery.ops.backends.cpp.load_kernels import kernels
from condconv_surgery.ops.backends.cpp.operators import convolution_gradients
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.per_sample_conv import format_of
from condconv_surgery.ops.per_sample.second_order import needs_recording, recorded_gradients
from condconv_surgery.ops.tracing_state import are_plain, is_intercepted

MAX_TAPS = 81
"""Positions of a kernel. The compiled code mixes all positions of a channel at a time, for a dense layer in part of the
first level of cache, and sums the gradients of the positions in a buffer for each such part."""

MIN_MACS_TO_CONVERT = 10
"""MACs for each element of the activations, from which on two copies of channels last are worth it: training takes 0.4
to 0.8 of the time of torch's operators there (3x3 at 14 px, 1x1 of 320 channels, depthwise 5x5), 1.5 for depthwise 3x3
at 28 px."""


MIN_NARROW_MACS = 4_000_000
"""MACs of an image, from which on torch's grouped convolution is faster with groups of 8 channels and 8 filters (0.7 to
0.9 of the time; training 0.6 to 0.8), and with groups of 4 where nothing is recorded (0.7; training 1.1 to 1.3)."""


def supports(x: Tensor, experts: Tensor, geometry: ConvGeometry | ConvArguments) -> bool:
    """Whether the compiled code is enabled and supports ``x`` [B, I, H, W], padded or not, and ``experts``.

    Its batch is not looked at, so that one compiled graph serves every batch.
    """
    return experts.dtype == torch.float32 and reads(x, experts, geometry)


def reads(x: Tensor, experts: Tensor, geometry: ConvGeometry | ConvArguments) -> bool:
    """``supports`` for experts that may be in int8 or bfloat16, which only an inference reads."""
    if kernels() is None or not x.is_cpu or not experts.is_cpu or x.dtype != torch.float32:
        return False
    channels, height, width = x.shape[1:]
    filters, per_group, kh, kw = experts.shape[1:]
    if kh * kw > MAX_TAPS:
        return False
    if kh * kw * per_group == 1 and (filters != channels or tuple(geometry.stride) != (1, 1)):
        return False  # a single product, but not of whole maps: torch takes 0.5 to 0.8 of the time
    if has_narrow_groups(x, experts, geometry):
        return False
    if x.is_contiguous() or format_of(x) == torch.contiguous_format:
        return True
    positions = height // geometry.stride[0] * (width // geometry.stride[1])
    elements = channels * height * width + filters * positions
    return bool(filters * per_group * kh * kw * positions >= MIN_MACS_TO_CONVERT * elements)


def has_narrow_groups(x: Tensor, experts: Tensor, geometry: ConvGeometry | ConvArguments) -> bool:
    """Whether the groups are of a width for which torch has fast convolutions, and the work is worth their overhead.

    Not for rounded experts, which torch does not convolve.
    """
    filters, per_group, kh, kw = experts.shape[1:]
    channels, height, width = x.shape[1:]
    if per_group not in (4, 8) or filters != channels or channels == per_group or experts.dtype != torch.float32:
        return False
    if kh * kw == 1 or (per_group == 4 and torch.is_grad_enabled()):
        return False
    positions = height // geometry.stride[0] * (width // geometry.stride[1])
    return bool(filters * per_group * kh * kw * positions >= MIN_NARROW_MACS)


def fast_convolve(
    implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry
) -> Tensor | None:
    """``convolve`` past torch's dispatcher, or None where that is not possible.

    It is taken before the choice: what is supported is always computed blockwise, except for scales alone.
    """
    if implementation != "auto" or kernels_for(x, experts, *mixture) is None or torch.is_autocast_enabled("cpu"):
        return None
    batch = x.shape[0]
    if batch == 0 or not supports(x, experts, geometry):
        return None
    if mixture.gate is None and mixture.spatial is None and (batch > 1 or all(part is None for part in mixture)):
        return None  # scales alone may be cheaper on the activations
    return convolve(*geometry.pad(x), experts, mixture)


def fast_rounded(
    x: Tensor, experts: Tensor, scales: Tensor | None, mixture: Mixture, geometry: ConvGeometry
) -> Tensor | None:
    """The convolution with experts in int8, with ``scales`` [E, O], or in bfloat16, or None where it is not possible.

    They are read as they are stored: no kernel and no expert is written to main memory as floats.
    """
    code = kernels_for(x, experts, scales, *mixture)
    batch = x.shape[0]
    if code is None or batch == 0 or torch.is_autocast_enabled("cpu") or not reads(x, experts, geometry):
        return None
    if mixture.gate is None and mixture.spatial is None and (batch > 1 or all(part is None for part in mixture)):
        return None  # as in fast_convolve
    padded, arguments = geometry.pad(x)
    y: Tensor = code.convolve_rounded(padded.contiguous(), experts.contiguous(), scales, *_ready(*mixture), *arguments)
    return in_format_of(x, y)


def convolve(x: Tensor, arguments: ConvArguments, experts: Tensor, mixture: Mixture) -> Tensor:
    """``out_scale_b * conv(in_scale_b * x_b, K_b)``, [B, I, H, W] -> [B, O, H', W'], without autograd."""
    y: Tensor = kernels().convolve_without_autograd(x.contiguous(), *_ready(experts, *mixture), *arguments)
    return in_format_of(x, y)


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``: the compiled code computes contiguous tensors."""
    return y if x.is_contiguous() else y.contiguous(memory_format=format_of(x))


def convolve_recorded(x: Tensor, arguments: ConvArguments, experts: Tensor, mixture: Mixture) -> Tensor:
    """The same as an operator that autograd, compilers and profilers know."""
    parts = [part if part is None or _is_ready(part) else part.to(torch.float32).contiguous() for part in mixture]
    contiguous = x if x.is_contiguous() else _Contiguous.apply(x)
    given = (contiguous, experts.contiguous(), *parts)
    recorded = not is_intercepted() and are_plain(*given)
    y: Tensor = _Convolution.apply(arguments, *given) if recorded else kernels().convolve(*given, *arguments)
    return in_format_of(x, y)


class _Convolution(torch.autograd.Function):
    """The operator ``cpp_convolve`` where only autograd sees it: the library's own recording takes longer than small
    layers."""

    @staticmethod
    def forward(ctx: Any, arguments: ConvArguments, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.arguments = arguments
        y: Tensor = kernels().convolve_without_autograd(*tensors, *arguments)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[1:])
        if needs_recording(grad):
            return (None, *recorded_gradients(grad, ctx.saved_tensors, ctx.arguments, needs))
        x, experts, *parts = ctx.saved_tensors
        return (None, *convolution_gradients(grad, x, experts, Mixture(*parts), ctx.arguments, needs))


class _Contiguous(torch.autograd.Function):
    """``contiguous`` whose gradient has the memory format of ``x``, for the layers before this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.format = format_of(x)
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if needs_recording(grad) else grad.contiguous(memory_format=ctx.format)  # vmap has no formats


def convolve_backward(
    grad: Tensor, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments, needs: list[bool]
) -> list[Tensor | None]:
    """The gradients of ``x``, the experts and the parts of the mixture, in this order.

    needs: which of them are asked for; the others may be None.
    """
    weight, *parts = _ready(experts, *mixture)
    return convolution_gradients(grad, x.contiguous(), weight, Mixture(*parts), arguments, needs)


def _ready(*parts: Tensor | None) -> list[Any]:
    """Experts and parts of a mixture as the compiled code reads them: contiguous, in float32."""
    return [part if part is None or _is_ready(part) else _made_ready(part) for part in parts]


def _is_ready(part: Tensor) -> bool:
    return part.dtype is torch.float32 and part.is_contiguous()


def _made_ready(part: Tensor) -> Tensor:
    return part.detach().to(torch.float32).contiguous()
