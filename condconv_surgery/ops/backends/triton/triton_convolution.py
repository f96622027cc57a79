"""Which layers Triton computes on a GPU, and their values and gradients from experts and a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from condconv_surgery.errors import InputError
from condconv_surgery.ops.backends.triton.availability import (
    DTYPES,
    MOST_NUMBERS,
    MOST_SAMPLES,
    is_small,
    takes,
)
from condconv_surgery.ops.backends.triton.layer_kinds import layer_of
from condconv_surgery.ops.implementations import per_sample_conv as kernel_convolution
from condconv_surgery.ops.implementations.block_sizes import MOST_DEVICE_BYTES, Block
from condconv_surgery.ops.mixture import Mixture

MOST_TAPS = 64
"""Positions of a depthwise kernel, which one program holds at a time for many channels."""

MOST_EXPERTS = 32
"""More of them at a time need more shared memory than a multiprocessor has."""


def fits(
    x: Tensor, experts: Tensor, mixture: Mixture, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Whether Triton takes ``x`` [B, I, H, W], padded or not, and ``experts``. Never a comparison of the batch."""
    if not takes(x) or experts.device != x.device:
        return False
    if experts.dtype not in DTYPES or all(part is None for part in mixture):
        return False
    count, filters = experts.shape[:2]
    if count > MOST_EXPERTS or experts.numel() >= MOST_NUMBERS or not is_small(filters * x.shape[2] * x.shape[3]):
        return False
    taps = experts.shape[3:].numel()
    if _is_depthwise(x, experts, groups):
        return taps <= MOST_TAPS
    if groups != 1:
        return False
    if taps == 1:
        return True
    phases_meet = all(s == 1 or d == 1 for s, d in zip(stride, dilation, strict=True))
    return phases_meet and (x.dtype != torch.float32 or _is_tf32_allowed())


def convolve(
    x: Tensor, experts: Tensor, mixture: Mixture, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """``y[b] = conv(x[b], K_b)`` with every part of the mixture in ``K_b``: [B, I, H, W] -> [B, O, H', W']."""
    _check(x, experts, mixture)
    y = kernel_convolution.empty_output(x, experts, stride, padding, dilation)
    if min(y.shape[2:]) < 1:
        given = f"A picture of {x.shape[2]}x{x.shape[3]} and a kernel of {experts.shape[3]}x{experts.shape[4]}."
        raise InputError(given, f"With padding={padding} and dilation={dilation} it does not fit in.", "padding='same'")
    for block in _blocks_of(x, experts):
        layer_of(x[block.samples], experts, block.of(mixture), stride, padding, dilation).convolve(y[block.samples])
    return y


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    experts: Tensor,
    mixture: Mixture,
    grads: list[Tensor],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    needs: list[bool],
) -> list[Tensor]:
    """``grads``: into them the gradients of ``x``, of the experts and of the mixture's parts, where ``needs`` asks."""
    # a sum over samples in half precision would lose what the parts hold
    at_once = experts.dtype == torch.float32 and grads[1].is_contiguous()
    of_experts = grads[1] if at_once else experts.new_empty(experts.shape, dtype=torch.float32)
    if not x.shape[0]:
        of_experts.zero_()
    for block in _blocks_of(x, experts):
        some = block.samples
        layer = layer_of(x[some], experts, block.of(mixture), stride, padding, dilation)
        if needs[0]:
            layer.gradient_of_input(grad[some], grads[0][some])
        if any(needs[1:]):
            found = layer.gradients_of_parts(grad[some], of_experts, add=bool(some.start))
            for total, value in zip(grads[2:], found, strict=True):
                if value is not None:
                    total[some] = value
    if not at_once:
        grads[1].copy_(of_experts)
    return grads


def kernel_of_one(x: Tensor, experts: Tensor, mixture: Mixture) -> Tensor:
    """The kernel of a batch of one as torch's convolution takes it, [O, I/G, kh, kw]; channels lie side by side."""
    _check(x, experts, mixture)
    return layer_of(x, experts, mixture, [1, 1], [0, 0], [1, 1]).weights()[0]


@torch.compiler.assume_constant_result
def _is_tf32_allowed() -> bool:
    """In convolutions of float32; it is by default, as in those of cuDNN."""
    cudnn = torch.backends.cudnn
    return cudnn.enabled and bool(cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def _check(x: Tensor, experts: Tensor, mixture: Mixture) -> None:
    """A part of another shape or on another device would be read past its end."""
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
    """All filters of as many samples as have their kernels in memory, which are of the dtype of ``x``, at a time."""
    batch, filters = x.shape[0], slice(0, experts.shape[1])
    size = min(MOST_SAMPLES, max(1, MOST_DEVICE_BYTES // max(1, experts[0].numel() * x.element_size())))
    return [Block(slice(start, min(start + size, batch)), filters) for start in range(0, batch, size)]
