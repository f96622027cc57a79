"""A conditional layer for one image at a time: its kernel is mixed in the graph, and is an input of one convolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.layers import ConditionalConv2d, ConditionalLinear
from condconv_surgery.ops.conditional_conv2d import mix_bias
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_kernels


class ComputedKernel(nn.Module):
    """``y = conv(x, W) + b`` with the mixed kernel and bias of the image; for inference.

    Shapes as ``ConditionalConv2d``. The bias is an input of the convolution, not an addition to its map, so that a
    runtime goes on to fuse the activation behind it. layer: whose router and parameters it takes.
    """

    def __init__(self, layer: ConditionalConv2d[Any]) -> None:
        super().__init__()
        self.router, self.standardisation, self.geometry = layer.router, layer.standardisation, layer.geometry
        self.is_linear = isinstance(layer, ConditionalLinear)
        self.weight, self.bias, self.ungated_bias = layer.weight, layer.bias, layer.ungated_bias

    def forward(self, x: Tensor, mixture: Mixture | None = None) -> Tensor:
        """x: [1, I, H, W], or [1, I] in the place of an ``nn.Linear``. mixture: see ``ConditionalConv2d``."""
        if self.is_linear:
            x = x[:, :, None, None]
        if mixture is None:
            assert self.router is not None
            mixture = self.router(x)
        gate, experts = mixture.gate, self.weight
        if self.standardisation is not None:
            experts, mixture = self.standardisation(experts, mixture)
        geometry = self.geometry
        x, arguments = geometry.pad(x)
        # a view: taking the first of a batch would be a copy in the graph
        kernel = mix_kernels(experts, mixture, geometry.groups).view(geometry.weight_shape)
        y = F.conv2d(x, kernel, self._mixed_bias(gate), *arguments)
        return y.flatten(1) if self.is_linear else y

    def _mixed_bias(self, gate: Tensor | None) -> Tensor | None:
        """[O], or None."""
        if self.bias is None:
            return self.ungated_bias
        bias = mix_bias(self.bias, gate).view(-1)
        return bias if self.ungated_bias is None else bias + self.ungated_bias
