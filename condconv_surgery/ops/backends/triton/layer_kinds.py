"""The three kinds of layers on a GPU, dense, depthwise and 1x1: mix kernels, convolve, and the gradients of both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.backends.triton.availability import fits_32_bits, kernels, span_of
from condconv_surgery.ops.geometry import ConvArguments
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample import per_sample_conv


class Layer:
    """Some samples of a layer. Their kernels, [B, O, T, I] with T = kh*kw, are mixed where they are needed.

    on_tensor_cores: float32 products are computed in TF32.
    """

    on_tensor_cores = False

    def __init__(self, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments) -> None:
        self.x, self.experts, self.mixture = x, experts.contiguous(), mixture
        self.geometry = (*map(tuple, arguments[:3]), tuple(experts.shape[3:]))

    def kernels(self, swap: bool = False) -> Tensor:
        """[B, O, T, I], or [B, I, T, O] swapped."""
        mix = kernels("mixing_kernels").mix
        return mix(self.experts, self.mixture, self.x.dtype, swap, self.on_tensor_cores)  # type: ignore[no-any-return]

    def weights(self) -> Tensor:
        """``kernels`` viewed as [B, O, I/G, kh, kw]."""
        _, filters, channels, kh, kw = self.experts.shape
        return self.kernels().view(-1, filters, kh, kw, channels).permute(0, 1, 4, 2, 3)

    def convolve(self, y: Tensor) -> None:
        raise NotImplementedError

    def gradient_of_input(self, grad: Tensor, grad_x: Tensor) -> None:
        raise NotImplementedError

    def gradient_of_kernels(self, grad: Tensor) -> Tensor:
        """[B, O, T, I]."""
        raise NotImplementedError

    def gradients_of_parts(self, grad: Tensor, grad_experts: Tensor, add: bool) -> list[Tensor | None]:
        """Write or add the gradient of the experts into ``grad_experts``; return those of the mixture's parts."""
        of_kernels, of_experts = self.gradient_of_kernels(grad), grad_experts.view_as(self.experts)
        unmix = kernels("mixing_kernels").unmix
        return unmix(of_kernels, self.experts, self.mixture, of_experts, add)  # type: ignore[no-any-return]


class Dense(Layer):
    """Channels last in shape order, contiguous in memory: patches are read along them."""

    on_tensor_cores = True

    def __init__(self, x: Tensor, *rest: Any) -> None:
        super().__init__(_channels_last(x), *rest)
        self.functions = kernels("dense_kernels")

    def convolve(self, y: Tensor) -> None:
        self.functions.convolve(self.x, self.kernels(), y, *self.geometry)

    def gradient_of_input(self, grad: Tensor, grad_x: Tensor) -> None:
        # float32 operands must be contiguous along the reduced dimension, here the filters
        swap = self.x.dtype == torch.float32
        mixed = self.kernels(swap)
        mixed = mixed.transpose(1, 3) if swap else mixed
        self.functions.gradient_of_input(_channels_last(grad), mixed, grad_x, *self.geometry)

    def gradient_of_kernels(self, grad: Tensor) -> Tensor:
        _, filters, channels, kh, kw = self.experts.shape
        of_kernels = self.x.new_empty(self.x.shape[0], filters, kh * kw, channels)
        self.functions.gradient_of_kernels(_channels_last(grad), self.x, of_kernels, *self.geometry)
        return of_kernels


class Depthwise(Layer):
    """Kernels are viewed as one filter of many channels, [B, 1, T, C], scaled by the product of both scales."""

    def __init__(self, x: Tensor, experts: Tensor, mixture: Mixture, *rest: Any) -> None:
        scale = _product(mixture.in_scale, mixture.out_scale)
        super().__init__(_addressable(x), experts, mixture._replace(in_scale=scale, out_scale=None), *rest)
        self.experts = self.experts.transpose(1, 2)
        self.scales = (mixture.in_scale, mixture.out_scale)
        self.functions = kernels("depthwise_kernels")

    def weights(self) -> Tensor:
        return super().weights().transpose(1, 2)

    def convolve(self, y: Tensor) -> None:
        self.functions.convolve(self.x, self.kernels(), y, *self.geometry)

    def gradient_of_input(self, grad: Tensor, grad_x: Tensor) -> None:
        self.functions.gradient_of_input(_addressable(grad), self.kernels(), grad_x, *self.geometry)

    def gradient_of_kernels(self, grad: Tensor) -> Tensor:
        of_kernels: Tensor = self.functions.gradient_of_kernels(_addressable(grad), self.x, *self.geometry)
        return of_kernels

    def gradients_of_parts(self, grad: Tensor, grad_experts: Tensor, add: bool) -> list[Tensor | None]:
        gate, spatial, of_scale, _ = super().gradients_of_parts(grad, grad_experts, add)
        in_scale, out_scale = self.scales
        of_in = None if in_scale is None else _product(of_scale, out_scale)
        of_out = None if out_scale is None else _product(of_scale, in_scale)
        return [gate, spatial, of_in, of_out]


class Pointwise(Layer):
    """A matrix product, which has no padding: the input is padded before."""

    def __init__(self, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments) -> None:
        high, wide = arguments.padding
        self.padding = (wide, wide, high, high)
        x = F.pad(x, self.padding) if any(self.padding) else x
        self.arguments = arguments._replace(padding=(0, 0), groups=1)
        super().__init__(_addressable(x), experts, mixture, self.arguments)

    def weights(self) -> Tensor:
        return _as_weights(self.kernels())

    def convolve(self, y: Tensor) -> None:
        per_sample_conv.convolve(self.x, self.weights(), y, self.arguments)

    def gradient_of_input(self, grad: Tensor, grad_x: Tensor) -> None:
        whole = torch.empty_like(self.x) if any(self.padding) else grad_x
        self._backward(grad, self.weights(), whole, self.x.new_empty(0), [True, False])
        if whole is not grad_x:
            grad_x.copy_(F.pad(whole, [-amount for amount in self.padding]))

    def gradient_of_kernels(self, grad: Tensor) -> Tensor:
        _, filters, channels, _, _ = self.experts.shape
        of_kernels = self.x.new_empty(self.x.shape[0], filters, 1, channels)
        self._backward(grad, _as_weights(of_kernels), self.x, of_kernels, [False, True])
        return of_kernels

    def _backward(self, grad: Tensor, weights: Tensor, grad_x: Tensor, of_kernels: Tensor, needs: list[bool]) -> None:
        tensors = (grad, self.x, weights, grad_x, of_kernels)
        per_sample_conv.convolve_backward(*tensors, False, self.arguments, needs)


def layer_of(x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments) -> Layer:
    """The kind of layer for the shapes of ``x`` [B, I, H, W] and ``experts`` [E, O, I/G, kh, kw]."""
    _, filters, channels, kh, kw = experts.shape
    kind = Depthwise if channels == 1 and x.shape[1] == filters else Pointwise if kh * kw == 1 else Dense
    return kind(x, experts, mixture, arguments)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _addressable(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy where 32-bit offsets do not address its elements."""
    return x if fits_32_bits(span_of(x)) else x.contiguous()


def _as_weights(mixed: Tensor) -> Tensor:
    """The kernels of a 1x1 layer, [B, O, 1, I] -> [B, O, I, 1, 1]."""
    return mixed.view(*mixed.shape[:2], -1, 1, 1)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b
