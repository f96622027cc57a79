"""A 1x1 convolution is a matrix product, so a batch of kernels is a batched matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.cost_model import LayerCost
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.implementation import Implementation, needs_different_kernels
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_kernels


class Bmm(Implementation):
    """``torch.bmm`` of the mixed kernels of all samples; 1x1 layers only."""

    name = "bmm"
    serves_any_batch = True

    def why_not(self, batch: int, mixture: Mixture, geometry: ConvGeometry, /) -> str | None:
        return needs_different_kernels(mixture) if geometry.pointwise else "bmm takes 1x1 kernels"

    def seconds(self, cost: LayerCost, /) -> float:
        seconds = cost.matrix_product() + cost.write_and_read(cost.kernel_bytes)
        stride = cost.geometry.stride
        if stride != (1, 1):
            seconds += cost.write(cost.input_bytes // (stride[0] * stride[1]))
        return seconds

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /) -> Tensor:
        x, (_, (ph, pw), _, groups) = geometry.pad(x)
        if ph or pw:
            x = F.pad(x, (pw, pw, ph, ph))
        x = x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
        batch, _, height, width = x.shape
        o, i = geometry.weight_shape[:2]
        kernels = mix_kernels(experts, mixture).reshape(batch * groups, o // groups, i)
        y = torch.bmm(kernels.to(x.dtype), x.reshape(batch * groups, i, height * width))
        return y.view(batch, o, height, width)
