"""The patches of each sample as columns, then a batched matrix product: exports with a dynamic batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.cost_model import LayerCost
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.implementation import Implementation, needs_different_kernels
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.mix_kernels import mix_kernels
from condconv_surgery.ops.per_sample.per_sample_conv import output_size


class Unfold(Implementation):
    """``F.unfold``, then ``torch.bmm``."""

    name = "unfold"
    serves_any_batch = True

    def why_not(self, batch: int, mixture: Mixture, geometry: ConvGeometry, /) -> str | None:
        return needs_different_kernels(mixture)

    def seconds(self, cost: LayerCost, /) -> float:
        (kh, kw), stride = cost.geometry.kernel_size, cost.geometry.stride
        columns = cost.input_bytes * kh * kw // (stride[0] * stride[1])
        return cost.matrix_product() + cost.write_and_read(cost.kernel_bytes) + cost.write_and_read(columns)

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /) -> Tensor:
        x, arguments = geometry.pad(x)
        batch, groups, (o, i, kh, kw) = x.shape[0], geometry.groups, geometry.weight_shape
        padding = tuple(arguments.padding)
        columns = F.unfold(x, (kh, kw), geometry.dilation, padding, geometry.stride)  # [B, I*kh*kw, H'*W']
        columns = columns.view(batch * groups, i * kh * kw, -1)
        kernels = mix_kernels(experts, mixture).reshape(batch * groups, o // groups, i * kh * kw)
        return torch.bmm(kernels.to(x.dtype), columns).view(batch, o, *output_size(x, (kh, kw), arguments))
