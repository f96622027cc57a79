"""A batch of one: mix its kernel, then one convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.cost_model import LayerCost
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.implementation import Implementation
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_kernels


class Plain(Implementation):
    """One kernel, one convolution."""

    name = "plain"
    exportable = False
    scales_kernels = True

    def why_not(self, batch: int, mixture: Mixture, geometry: ConvGeometry, /) -> str | None:
        return None if batch == 1 else "plain takes a batch of one"

    def seconds(self, cost: LayerCost, /) -> float:
        return cost.convolution() + cost.write_and_read(cost.kernel_bytes)

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /) -> Tensor:
        x, arguments = geometry.pad(x)
        kernel = mix_kernels(experts, mixture, geometry.groups)[0].to(x.dtype)  # [O, I/G, kh, kw]
        return F.conv2d(x, kernel, None, *arguments)
