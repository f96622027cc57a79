"""CondConv: Conditionally Parameterized Convolutions for Efficient Inference.

Yang, Bender, Le, Ngiam, NeurIPS 2019, arXiv 1904.04971, equation 2:

    r(x) = sigmoid(GAP(x) R),    y = (r_1 W_1 + ... + r_n W_n) * x

Both released implementations add a bias to ``R``; so does this one. The gate is ``(2/n) r(x)``: the gates of a zeroed
router sum to 1, and an expert has the scale of a trained kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from condconv_surgery.layers.conditional import ConditionalConv2d
from condconv_surgery.layers.router_base import Router, router_for, zero_linear_
from condconv_surgery.layers.start_directions import Features, start_antithetic_
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.router_forms import SigmoidGates
from condconv_surgery.recipe import CondConv, Variant


@router_for(CondConv)
class CondConvRouter(Router):
    """``gate = (2/n) sigmoid(pooled R + b)``: [B, I] -> [B, E]."""

    def __init__(
        self,
        geometry: ConvGeometry,
        variant: CondConv,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(geometry.in_channels, variant.experts, device=device, dtype=dtype)
        self.weight_factor = self.bias_factor = 2.0 / variant.experts

    @classmethod
    def best_start(cls, variant: Variant) -> str:
        return "antithetic"

    def mix(self, pooled: Tensor) -> Mixture:
        return Mixture(self.weight_factor * torch.sigmoid(self.linear(pooled)))

    def fusable_form(self) -> SigmoidGates:
        return SigmoidGates(self.linear, self.weight_factor)

    def whole_form(self) -> SigmoidGates:
        return self.fusable_form()

    def zero_(self) -> CondConvRouter:
        zero_linear_(self.linear)
        return self

    def start_(self, features: Features, spread: float, generator: torch.Generator) -> None:
        """Logits in antithetic pairs, ``z[2k+1] = -z[2k]``: ``sigmoid(z) + sigmoid(-z) = 1``. An odd one is zero."""
        start_antithetic_(self.linear, features, spread, generator)


class CondConv2d(ConditionalConv2d[CondConv]):
    """A convolution whose kernel is a sigmoid-gated sum of experts, mixed for each sample.

    ``W_b = sum_e (2/n) sigmoid(GAP(x_b) R)_e W_e``. The arguments are those of ``nn.Conv2d`` and a ``CondConv``.
    """

    variant_class = CondConv
