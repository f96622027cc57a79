"""Mixing kernels and mixing inputs are the same: the input times each gate, then one dense convolution of E*I channels,
whose sums over channels mix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.cost_model import NOMINAL_BATCH, LayerCost
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.implementation import Implementation, needs_gates_alone
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.per_sample_conv import format_of


class MixInputs(Implementation):
    """``conv(x, sum_e g_e W_e) = conv([g_1 x, ..., g_E x], [W_1, ..., W_E])``."""

    name = "mix-inputs"
    serves_any_batch = True
    chosen_on_gpu = True

    def why_not(self, batch: int, mixture: Mixture, geometry: ConvGeometry, /) -> str | None:
        return needs_gates_alone(mixture)

    def seconds(self, cost: LayerCost, /) -> float:
        # one large kernel for all samples, in the dtype and layout of the activations
        moved = cost.experts * cost.input_bytes + cost.experts * cost.kernel_bytes // NOMINAL_BATCH
        return cost.convolution(cost.experts * cost.macs) + cost.write_and_read(moved)

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry, /) -> Tensor:
        assert mixture.gate is not None
        x, arguments = geometry.pad(x)
        groups, count = geometry.groups, experts.shape[0]
        gate = mixture.gate.to(x.dtype)
        if format_of(x) == torch.channels_last:
            by_group = x.permute(0, 2, 3, 1).reshape(*x.shape[:1], *x.shape[2:], groups, 1, -1)  # [B, H, W, G, 1, I/G]
            scaled = (by_group * gate[:, None, None, None, :, None]).flatten(3).permute(0, 3, 1, 2)
        else:
            by_group = x.reshape(x.shape[0], groups, 1, -1, *x.shape[2:])  # [B, G, 1, I/G, H, W]
            scaled = (by_group * gate[:, None, :, None, None, None]).flatten(1, 3)
        # scaled: [B, G*E*I/G, H, W]
        filters = experts.transpose(0, 1).reshape(-1, count * experts.shape[2], *experts.shape[3:]).to(x.dtype)
        return F.conv2d(scaled, filters, None, *arguments)
