"""A conditional layer for one image at a time: its kernel is mixed in the graph, and is an input of one convolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.deploy.forms.served_layer import ServedLayer
from condconv_surgery.layers import ConditionalConv2d
from condconv_surgery.ops.conditional_conv2d import mix_bias
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_kernels


class ComputedKernel(ServedLayer):
    """``y = conv(x, W) + b`` with the mixed kernel and bias of the image, for a batch of one.

    The bias is an input of the convolution, not an addition to its map, so that a runtime goes on to fuse the
    activation behind it. layer: whose router and parameters it takes.
    """

    def __init__(self, layer: ConditionalConv2d[Any]) -> None:
        super().__init__(layer)
        self.weight, self.standardisation = layer.weight, layer.standardisation

    def convolve(self, x: Tensor, mixture: Mixture) -> Tensor:
        """See ``ServedLayer``."""
        experts, geometry = self.weight, self.geometry
        if self.standardisation is not None:
            experts, mixture = self.standardisation(experts, mixture)
        x, arguments = geometry.pad(x)
        # a view: taking the first of a batch would be a copy in the graph
        kernel = mix_kernels(experts, mixture, geometry.groups).view(geometry.weight_shape)
        return F.conv2d(x, kernel, self._mixed_bias(mixture.gate), *arguments)

    def _mixed_bias(self, gate: Tensor | None) -> Tensor | None:
        """[O], or None."""
        if self.bias is None:
            return self.ungated_bias
        bias = mix_bias(self.bias, gate).view(-1)
        return bias if self.ungated_bias is None else bias + self.ungated_bias
