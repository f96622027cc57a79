"""The layers that Triton supports on a GPU, their values and gradients from experts and a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.errors import InputError
from condconv_surgery.ops.backends.triton.availability import (
    DTYPES,
    MAX_ELEMENTS,
    MAX_SAMPLES,
    fits_32_bits,
    supports_tensor,
)
from condconv_surgery.ops.backends.triton.layer_kinds import layer_of
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.block_sizes import MAX_DEVICE_BYTES, Block
from condconv_surgery.ops.per_sample.per_sample_conv import empty_output

MAX_TAPS = 64
"""Positions of a depthwise kernel, which one program holds at a time for many channels."""

MAX_EXPERTS = 32
"""More experts at a time need more shared memory than a multiprocessor has."""


def supports(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry | ConvArguments) -> bool:
    """Whether Triton supports ``x`` [B, I, H, W], padded or not, and ``experts``. The batch is never compared."""
    if not supports_tensor(x) or experts.device != x.device:
        return False
    if experts.dtype not in DTYPES or all(part is None for part in mixture):
        return False
    count, filters = experts.shape[:2]
    if count > MAX_EXPERTS or experts.numel() >= MAX_ELEMENTS:
        return False
    if not fits_32_bits(filters * x.shape[2] * x.shape[3]):
        return False
    taps = experts.shape[3:].numel()
    if _is_depthwise(x, experts, geometry.groups):
        return taps <= MAX_TAPS
    if geometry.groups != 1:
        return False
    if taps == 1:
        return True
    phases_meet = all(s == 1 or d == 1 for s, d in zip(geometry.stride, geometry.dilation, strict=True))
    return phases_meet and (x.dtype != torch.float32 or _is_tf32_allowed())


def convolve(x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments) -> Tensor:
    """``y[b] = conv(x[b], K_b)`` with every part of the mixture in ``K_b``: [B, I, H, W] -> [B, O, H', W']."""
    _check(x, experts, mixture)
    y = empty_output(x, experts, arguments)
    if min(y.shape[2:]) < 1:
        raise InputError(
            f"An image of {x.shape[2]}x{x.shape[3]} and a kernel of {experts.shape[3]}x{experts.shape[4]}.",
            f"With padding={list(arguments.padding)} and dilation={list(arguments.dilation)} the kernel is larger.",
            "padding='same'",
        )
    for block in _blocks_of(x, experts):
        layer_of(x[block.samples], experts, block.of(mixture), arguments).convolve(y[block.samples])
    return y


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    mixture: Mixture,
    arguments: ConvArguments,
    out: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Write into ``out`` the gradients of ``x``, of the experts and of the mixture's parts, where ``needs`` asks."""
    # sum over samples in float32: half precision would lose small terms
    in_place = experts.dtype == torch.float32 and out[1].is_contiguous()
    of_experts = out[1] if in_place else experts.new_empty(experts.shape, dtype=torch.float32)
    if not x.shape[0]:
        of_experts.zero_()
    for block in _blocks_of(x, experts):
        some = block.samples
        layer = layer_of(x[some], experts, block.of(mixture), arguments)
        if needs[0]:
            layer.gradient_of_input(grad[some], out[0][some])
        if any(needs[1:]):
            of_parts = layer.gradients_of_parts(grad[some], of_experts, add=bool(some.start))
            for total, value in zip(out[2:], of_parts, strict=True):
                if value is not None:
                    total[some] = value
    if not in_place:
        out[1].copy_(of_experts)
    return out


def kernel_of_one(x: Tensor, experts: Tensor, mixture: Mixture) -> Tensor:
    """The kernel of a batch of one as torch's convolution takes it, [O, I/G, kh, kw], in channels last."""
    _check(x, experts, mixture)
    return layer_of(x, experts, mixture, ConvArguments((1, 1), (0, 0), (1, 1), 1)).weights()[0]


@torch.compiler.assume_constant_result
def _is_tf32_allowed() -> bool:
    """In float32 convolutions; the default, as in cuDNN."""
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):  # a torch without precision settings by operator
        return bool(cudnn.enabled and cudnn.allow_tf32)
    return bool(cudnn.enabled and cudnn.conv.fp32_precision == "tf32")


def _check(x: Tensor, experts: Tensor, mixture: Mixture) -> None:
    """A kernel would read past the end of a part of another shape or on another device."""
    (batch, channels), (count, filters, _, kh, kw) = x.shape[:2], experts.shape
    shapes = Mixture((batch, count), (batch, kh, kw), (batch, channels), (batch, filters))  # type: ignore[arg-type]
    for name, part, shape in zip(Mixture._fields, mixture, shapes, strict=True):
        if part is not None and (part.shape != shape or part.device != x.device):
            raise InputError(
                f"The {name} of a mixture has the shape {tuple(part.shape)} and is on {part.device}.",
                f"For {batch} samples, {count} experts, {channels} to {filters} channels it is {shape}, on {x.device}.",
            )


def _is_depthwise(x: Tensor, experts: Tensor, groups: int) -> bool:
    return experts.shape[2] == 1 and groups == x.shape[1] == experts.shape[1]


def _blocks_of(x: Tensor, experts: Tensor) -> list[Block]:
    """Blocks of all filters and as many samples as have kernels, in the dtype of ``x``, within ``MAX_DEVICE_BYTES``."""
    batch, filters = x.shape[0], slice(0, experts.shape[1])
    size = min(MAX_SAMPLES, max(1, MAX_DEVICE_BYTES // max(1, experts[0].numel() * x.element_size())))
    return [Block(slice(start, min(start + size, batch)), filters) for start in range(0, batch, size)]
