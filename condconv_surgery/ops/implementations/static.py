"""No mixing: one convolution with the one expert. Also computes nothing for an empty batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.cost_model import LayerCost
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.implementation import Implementation
from condconv_surgery.ops.mixture import Mixture, same_kernel_for_all


class Static(Implementation):
    """One expert without spatial attention; scales act on the activations."""

    name = "static"
    serves_any_batch = True
    chosen_on_cpu = chosen_on_gpu = True

    def why_not(self, batch: int, mixture: Mixture, geometry: ConvGeometry, /) -> str | None:
        return None if same_kernel_for_all(mixture) else "each sample has its own kernel"

    def seconds(self, cost: LayerCost, /) -> float:
        return cost.convolution()

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /) -> Tensor:
        x, arguments = geometry.pad(x)
        return F.conv2d(x, experts[0], None, *arguments)
