"""Three kinds of layers on a GPU: how each has Triton mix its kernels, uses them, and goes back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.backends.triton.availability import is_small, room, span_of
from condconv_surgery.ops.implementations import per_sample_conv as kernel_convolution
from condconv_surgery.ops.mixture import Mixture


class Layer:
    """Some samples of a layer, whose kernels are made where they are needed: [B, O, T, I].

    on_tensor_cores: its products are of TF32 numbers where they are of 32 bits.
    """

    on_tensor_cores = False

    def __init__(
        self,
        x: Tensor,
        experts: Tensor,
        mixture: Mixture,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> None:
        self.x, self.experts, self.mixture = x, experts.contiguous(), mixture
        self.geometry = (tuple(stride), tuple(padding), tuple(dilation), tuple(experts.shape[3:]))

    def kernels(self, swap: bool = False) -> Tensor:
        """[B, O, T, I], or [B, I, T, O] swapped."""
        made: Tensor = room("mixing_kernels").mix(self.experts, self.mixture, self.x.dtype, swap, self.on_tensor_cores)
        return made

    def weights(self) -> Tensor:
        """The same numbers in the same places as [B, O, I/G, kh, kw]."""
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
        """That of the experts put, or added, into ``grad_experts``; returned those of the mixture's parts."""
        of_kernels, of_experts = self.gradient_of_kernels(grad), grad_experts.view_as(self.experts)
        parts: list[Tensor | None] = room("mixing_kernels").unmix(
            of_kernels, self.experts, self.mixture, of_experts, add
        )
        return parts


class Dense(Layer):
    """Channels come first in memory: patches are read along them."""

    on_tensor_cores = True

    def __init__(self, x: Tensor, *rest: Any) -> None:
        super().__init__(_channels_first(x), *rest)
        self.room = room("dense_kernels")

    def convolve(self, y: Tensor) -> None:
        self.room.convolve(self.x, self.kernels(), y, *self.geometry)

    def gradient_of_input(self, grad: Tensor, grad_x: Tensor) -> None:
        # numbers of 32 bits must lie along the sum of a product, which is over the filters here
        swap = self.x.dtype == torch.float32
        kernels = self.kernels(swap)
        kernels = kernels.transpose(1, 3) if swap else kernels
        self.room.gradient_of_input(_channels_first(grad), kernels, grad_x, *self.geometry)

    def gradient_of_kernels(self, grad: Tensor) -> Tensor:
        _, filters, channels, kh, kw = self.experts.shape
        of_kernels = self.x.new_empty(self.x.shape[0], filters, kh * kw, channels)
        self.room.gradient_of_kernels(_channels_first(grad), self.x, of_kernels, *self.geometry)
        return of_kernels


class Depthwise(Layer):
    """One filter of many channels, the same numbers in the same places: [B, 1, T, C], scaled by both scales at once."""

    def __init__(self, x: Tensor, experts: Tensor, mixture: Mixture, *rest: Any) -> None:
        scale = _product(mixture.in_scale, mixture.out_scale)
        super().__init__(_within_reach(x), experts, mixture._replace(in_scale=scale, out_scale=None), *rest)
        self.experts = self.experts.transpose(1, 2)
        self.scales = (mixture.in_scale, mixture.out_scale)
        self.room = room("depthwise_kernels")

    def weights(self) -> Tensor:
        return super().weights().transpose(1, 2)

    def convolve(self, y: Tensor) -> None:
        self.room.convolve(self.x, self.kernels(), y, *self.geometry)

    def gradient_of_input(self, grad: Tensor, grad_x: Tensor) -> None:
        self.room.gradient_of_input(_within_reach(grad), self.kernels(), grad_x, *self.geometry)

    def gradient_of_kernels(self, grad: Tensor) -> Tensor:
        of_kernels: Tensor = self.room.gradient_of_kernels(_within_reach(grad), self.x, *self.geometry)
        return of_kernels

    def gradients_of_parts(self, grad: Tensor, grad_experts: Tensor, add: bool) -> list[Tensor | None]:
        gate, spatial, of_scale, _ = super().gradients_of_parts(grad, grad_experts, add)
        in_scale, out_scale = self.scales
        of_in = None if in_scale is None else _product(of_scale, out_scale)
        of_out = None if out_scale is None else _product(of_scale, in_scale)
        return [gate, spatial, of_in, of_out]


class Pointwise(Layer):
    """A matrix product, which knows no padding: margins are added before."""

    def __init__(
        self, x: Tensor, experts: Tensor, mixture: Mixture, stride: list[int], padding: list[int], dilation: list[int]
    ) -> None:
        self.margins = (padding[1], padding[1], padding[0], padding[0])
        x = F.pad(x, self.margins) if any(self.margins) else x
        super().__init__(_within_reach(x), experts, mixture, stride, [0, 0], dilation)
        self.shape = (stride, [0, 0], dilation, 1)

    def weights(self) -> Tensor:
        return _as_weights(self.kernels())

    def convolve(self, y: Tensor) -> None:
        kernel_convolution.convolve(self.x, self.weights(), y, *self.shape)

    def gradient_of_input(self, grad: Tensor, grad_x: Tensor) -> None:
        whole = torch.empty_like(self.x) if any(self.margins) else grad_x
        self._backward(grad, self.weights(), whole, self.x.new_empty(0), [True, False])
        if whole is not grad_x:
            grad_x.copy_(F.pad(whole, [-margin for margin in self.margins]))

    def gradient_of_kernels(self, grad: Tensor) -> Tensor:
        _, filters, channels, _, _ = self.experts.shape
        of_kernels = self.x.new_empty(self.x.shape[0], filters, 1, channels)
        self._backward(grad, _as_weights(of_kernels), self.x, of_kernels, [False, True])
        return of_kernels

    def _backward(self, grad: Tensor, weights: Tensor, grad_x: Tensor, of_kernels: Tensor, needs: list[bool]) -> None:
        given = (grad, self.x, weights, grad_x, of_kernels, False)
        kernel_convolution.convolve_backward(*given, *self.shape, needs)


def layer_of(
    x: Tensor, experts: Tensor, mixture: Mixture, stride: list[int], padding: list[int], dilation: list[int]
) -> Layer:
    """Of the kind that the shapes of ``x`` [B, I, H, W] and ``experts`` [E, O, I/G, kh, kw] say."""
    _, filters, channels, kh, kw = experts.shape
    kind = Depthwise if channels == 1 and x.shape[1] == filters else Pointwise if kh * kw == 1 else Dense
    return kind(x, experts, mixture, stride, padding, dilation)


def _channels_first(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _within_reach(x: Tensor) -> Tensor:
    """As it is, unless it is spread too far."""
    return x if is_small(span_of(x)) else x.contiguous()


def _as_weights(kernels: Tensor) -> Tensor:
    """The kernels of a 1x1 layer, [B, O, 1, I] -> [B, O, I, 1, 1]."""
    return kernels.view(*kernels.shape[:2], -1, 1, 1)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b
