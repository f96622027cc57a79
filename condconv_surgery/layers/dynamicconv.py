"""DynamicConv: Dynamic Convolution, Attention over Convolution Kernels.

Chen, Dai, Liu, Chen, Yuan, Liu, CVPR 2020, arXiv 1912.03458, equations 2 and 5:

    pi(x) = softmax(FC_2(relu(FC_1(GAP(x)))) / T),    y = (pi_1 W_1 + ... + pi_n W_n) * x

The paper's hidden width is I/4, and T falls from 30 to 1 in the first epochs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.layers.conditional import ConditionalConv2d
from condconv_surgery.layers.router_base import Router, router_for, temperature_buffer, zero_linear_
from condconv_surgery.layers.start_directions import Features, outputs_of, standardise_outputs_, start_linear_
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.router_forms import Attention
from condconv_surgery.recipe import DynamicConv, Variant


@router_for(DynamicConv)
class DynamicConvRouter(Router):
    """``gate = softmax(FC(relu(FC(pooled))) / T)``: [B, I] -> [B, E]."""

    temperature: Tensor

    def __init__(
        self,
        geometry: ConvGeometry,
        variant: DynamicConv,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = max(geometry.in_channels // variant.reduction, 1)
        self.reduce = nn.Linear(geometry.in_channels, hidden, device=device, dtype=dtype)
        self.linear = nn.Linear(hidden, variant.experts, device=device, dtype=dtype)
        self.register_buffer("temperature", temperature_buffer(variant.temperature, device))

    @classmethod
    def best_start(cls, variant: Variant) -> str:
        return "softmax"

    def mix(self, pooled: Tensor) -> Mixture:
        logits = self.linear(F.relu(self.reduce(pooled)))
        return Mixture(gate=torch.softmax(logits / self.temperature, dim=1))

    def fusable_form(self) -> Attention:
        return Attention(self.reduce, None, True, [self.linear], self.temperature)

    def whole_form(self) -> Attention:
        return self.fusable_form()

    def zero_(self) -> DynamicConvRouter:
        zero_linear_(self.linear)
        return self

    def start_(self, features: Features, spread: float, generator: torch.Generator) -> None:
        """Any logits: a softmax sums to 1. The hidden features are standardised first, so that each is used."""
        standardise_outputs_(self.reduce, features)
        hidden = F.relu(outputs_of(self.reduce, features))
        start_linear_(self.linear, features._replace(values=hidden), spread, generator)


class DynamicConv2d(ConditionalConv2d[DynamicConv]):
    """A convolution whose kernel is a softmax-weighted mean of experts, mixed for each sample.

    ``W_b = sum_e softmax(MLP(GAP(x_b)) / T)_e W_e``. The arguments are those of ``nn.Conv2d`` and a ``DynamicConv``.
    """

    variant_class = DynamicConv
