"""Which layers Triton computes on a GPU, and their values and gradients from experts and a mixture."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.errors import InputError, one_line
from condconv_surgery.layers import kernel_convolution
from condconv_surgery.layers.blocking import MOST_DEVICE_BYTES, Block
from condconv_surgery.layers.mixture import Mixture

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MOST_TAPS = 64
"""Positions of a depthwise kernel, which one program holds at a time for many channels."""

MOST_EXPERTS = 32
"""More of them at a time need more shared memory than a multiprocessor has."""

MOST_NUMBERS = 1 << 31
"""Of all experts, and from the first to the last of one sample: places there are 32-bit numbers."""

MOST_SAMPLES = (1 << 16) - 1
"""Of one call: the longest that a grid of programs can be in its third direction."""


def fits(
    x: Tensor, experts: Tensor, mixture: Mixture, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Whether Triton takes ``x`` [B, I, H, W], padded or not, and ``experts``. Never a comparison of the batch."""
    if not takes(x) or experts.device != x.device:
        return False
    if experts.dtype not in DTYPES or all(part is None for part in mixture):
        return False
    count, filters = experts.shape[:2]
    if count > MOST_EXPERTS or experts.numel() >= MOST_NUMBERS or not _is_small(filters * x.shape[2] * x.shape[3]):
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


def takes(x: Tensor) -> bool:
    """Where ``x`` is, Triton can be called on numbers of its dtype, and on so many."""
    return is_here(x.device) and x.dtype in DTYPES and _is_small(_span(x))


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
        layer = _Layer(x[block.samples], experts, block.of(mixture), stride, padding, dilation)
        layer.convolve(y[block.samples])
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
        layer = _Layer(x[some], experts, block.of(mixture), stride, padding, dilation)
        if needs[0]:
            layer.gradient_of_input(grad[some], grads[0][some])
        if any(needs[1:]):
            found = layer.gradients_of_kernels(grad[some], of_experts, add=bool(some.start))
            for total, value in zip(grads[2:], found, strict=True):
                if value is not None:
                    total[some] = value
    if not at_once:
        grads[1].copy_(of_experts)
    return grads


class _Layer:
    """Some samples of a layer, whose kernels are made where they are needed: [B, O, T, I], or [B, 1, T, C] where it is
    depthwise."""

    def __init__(
        self,
        x: Tensor,
        experts: Tensor,
        mixture: Mixture,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> None:
        count, filters, channels, kh, kw = experts.shape
        self.depthwise = channels == 1 and x.shape[1] == filters
        self.pointwise = not self.depthwise and kh * kw == 1
        self.margins = (padding[1], padding[1], padding[0], padding[0]) if self.pointwise else (0, 0, 0, 0)
        if any(self.margins):  # a matrix product knows no padding
            x, padding = F.pad(x, self.margins), [0, 0]
        self.geometry = (tuple(stride), tuple(padding), tuple(dilation), (kh, kw))
        self.experts, self.mixture, self.given = experts.contiguous(), mixture, mixture
        if self.depthwise:  # as one filter of many channels: the same numbers in the same places
            self.experts = self.experts.view(count, 1, filters, kh, kw)
            self.mixture = mixture._replace(in_scale=_product(mixture.in_scale, mixture.out_scale), out_scale=None)
        self.by_product = not self.depthwise and not self.pointwise
        self.room = room("depthwise" if self.depthwise else "dense")
        # channels side by side: the patches of dense layers are read along them
        self.x = self._channels_last(x)

    def convolve(self, y: Tensor) -> None:
        kernels = self._kernels()
        if self.pointwise:
            stride, padding, dilation, _ = map(list, self.geometry)
            kernel_convolution.convolve(self.x, _as_weights(kernels), y, stride, padding, dilation, 1)
        else:
            self.room.convolve(self.x, kernels, y, *self.geometry)

    def gradient_of_input(self, grad: Tensor, grad_x: Tensor) -> None:
        if self.pointwise:
            whole = torch.empty_like(self.x) if any(self.margins) else grad_x
            self._pointwise_backward(grad, self._kernels(), whole, self.x.new_empty(0), [True, False])
            if whole is not grad_x:
                grad_x.copy_(F.pad(whole, [-margin for margin in self.margins]))
            return
        # numbers of 32 bits must lie along the sum of a product, which is over the filters here
        swap = self.by_product and self.x.dtype == torch.float32
        kernels = self._kernels(swap)
        kernels = kernels.transpose(1, 3) if swap else kernels
        self.room.gradient_of_input(self._channels_last(grad), kernels, grad_x, *self.geometry)

    def gradients_of_kernels(self, grad: Tensor, grad_experts: Tensor, add: bool) -> list[Tensor | None]:
        """That of the experts put, or added, into ``grad_experts``; returned those of the mixture's parts."""
        if self.depthwise:
            of_kernels: Tensor = self.room.gradient_of_kernels(self._channels_last(grad), self.x, *self.geometry)
        else:
            _, filters, channels, kh, kw = self.experts.shape
            of_kernels = self.x.new_empty(self.x.shape[0], filters, kh * kw, channels)
            if self.pointwise:
                self._pointwise_backward(grad, of_kernels, self.x, of_kernels, [False, True])
            else:
                self.room.gradient_of_kernels(self._channels_last(grad), self.x, of_kernels, *self.geometry)
        parts = room("mixing").unmix(of_kernels, self.experts, self.mixture, grad_experts.view_as(self.experts), add)
        gate, spatial, in_scale, out_scale = parts
        if self.depthwise and in_scale is not None:
            _, _, given_in, given_out = self.given
            out_scale = None if given_out is None else _product(in_scale, given_in)
            in_scale = None if given_in is None else _product(in_scale, given_out)
        return [gate, spatial, in_scale, out_scale]

    def _kernels(self, swap: bool = False) -> Tensor:
        kernels: Tensor = room("mixing").mix(
            self.experts, self.mixture, self.x.dtype, swap, tensor_cores=self.by_product
        )
        return kernels

    def _channels_last(self, x: Tensor) -> Tensor:
        """As patches are read; a gradient of a depthwise layer as it is, unless it is spread too far."""
        if self.by_product:
            return x.contiguous(memory_format=torch.channels_last)
        return x if _is_small(_span(x)) else x.contiguous()

    def _pointwise_backward(
        self, grad: Tensor, kernels: Tensor, grad_x: Tensor, of_kernels: Tensor, needs: list[bool]
    ) -> None:
        stride, padding, dilation, _ = map(list, self.geometry)
        given = (grad, self.x, _as_weights(kernels), grad_x, of_kernels, False)
        kernel_convolution.convolve_backward(*given, stride, padding, dilation, 1, needs)


def _as_weights(kernels: Tensor) -> Tensor:
    """The kernels of a 1x1 layer, [B, O, 1, I] -> [B, O, I, 1, 1]."""
    return kernels.view(*kernels.shape[:2], -1, 1, 1)


@torch.compiler.assume_constant_result
def is_here(device: torch.device) -> bool:
    """Triton is installed, and the device has the tensor cores that it is asked for (Ampere and later)."""
    return _is_here(device)


@torch.compiler.assume_constant_result
def _is_tf32_allowed() -> bool:
    """In convolutions of float32; it is by default, as in those of cuDNN."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


@cache
def _is_here(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    if os.environ.get("CONDCONV_TRITON") == "0" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:  # it compiles a piece of C at its first use
        return import_module("triton.runtime").driver.active.utils is not None
    except Exception as error:
        warnings.warn(
            f"Triton does not work here ({one_line(error)}): conditional layers are computed by torch's own operators, "
            "which takes longer. CONDCONV_TRITON=0 asks for that in silence.",
            stacklevel=2,
        )
        return False


def room(name: str) -> Any:
    """One of the modules that need Triton, which is installed only beside a GPU."""
    return import_module(f"condconv_surgery.layers.gpu.{name}")


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


def _span(x: Tensor) -> int:
    """How far apart two numbers of one sample can be in memory."""
    return sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))


def _is_small(number: int) -> bool:
    return not isinstance(number, int) or number < MOST_NUMBERS  # a symbolic one is not compared


def _is_depthwise(x: Tensor, experts: Tensor, groups: int) -> bool:
    return experts.shape[2] == 1 and groups == x.shape[1] == experts.shape[1]


def _blocks_of(x: Tensor, experts: Tensor) -> list[Block]:
    """All filters of as many samples as have their kernels in memory, which are of the dtype of ``x``, at a time."""
    batch, filters = x.shape[0], slice(0, experts.shape[1])
    size = min(MOST_SAMPLES, max(1, MOST_DEVICE_BYTES // max(1, experts[0].numel() * x.element_size())))
    return [Block(slice(start, min(start + size, batch)), filters) for start in range(0, batch, size)]


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b
