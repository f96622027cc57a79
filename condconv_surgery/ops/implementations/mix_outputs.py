"""Mixing kernels and mixing outputs are the same: one dense convolution with E*O filters, then the mixture."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.cost_model import NOMINAL_BATCH, LayerCost
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.implementation import Implementation, needs_gates_alone
from condconv_surgery.ops.mixture import Mixture


class MixOutputs(Implementation):
    """``conv(x, sum_e g_e W_e) = sum_e g_e conv(x, W_e)``."""

    name = "mix-outputs"
    serves_any_batch = True
    chosen_on_gpu = True

    def why_not(self, batch: int, mixture: Mixture, geometry: ConvGeometry, /) -> str | None:
        return needs_gates_alone(mixture)

    def seconds(self, cost: LayerCost, /) -> float:
        # one large kernel for all samples, in the dtype and layout of the activations
        moved = cost.experts * cost.output_bytes + cost.experts * cost.kernel_bytes // NOMINAL_BATCH
        return cost.convolution(cost.experts * cost.macs) + cost.write_and_read(moved)

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /) -> Tensor:
        assert mixture.gate is not None
        x, arguments = geometry.pad(x)
        batch, groups, count = x.shape[0], geometry.groups, experts.shape[0]
        by_group = experts.view(count, groups, -1, *experts.shape[2:])  # [E, G, O/G, I/G, kh, kw]
        filters = by_group.transpose(0, 1).flatten(0, 2).to(x.dtype)  # [G*E*O/G, I/G, kh, kw]
        y = F.conv2d(x, filters, None, *arguments)
        height, width = y.shape[2:]
        y = y.reshape(batch, groups, count, -1).transpose(1, 2).reshape(batch, count, -1)  # [B, E, O*H'*W']
        mixed = mixture.gate.to(y.dtype).unsqueeze(1) @ y  # [B, 1, O*H'*W']
        return mixed.view(batch, geometry.out_channels, height, width)
