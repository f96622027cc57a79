"""A variant as somebody else would write it: one file outside of the package. Importing it registers the variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.layers import ConvGeometry, Mixture, Router, router_for
from condconv_surgery.recipe import Variant, variant


@variant("softmaxconv")
@dataclass(frozen=True)
class SoftmaxConv(Variant):
    """Softmax gates from one linear map of the pooled input."""

    sharpness: float = 1.0


@router_for(SoftmaxConv)
class SoftmaxRouter(Router):
    def __init__(self, geometry: ConvGeometry, variant: SoftmaxConv, **factory: Any) -> None:
        super().__init__()
        self.sharpness = variant.sharpness
        self.linear = nn.Linear(geometry.in_channels, variant.experts, **factory)

    def mix(self, pooled: Tensor) -> Mixture:
        return Mixture(torch.softmax(self.sharpness * self.linear(pooled), dim=1))

    def zero_(self) -> SoftmaxRouter:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        return self
