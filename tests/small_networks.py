"""Networks that train in milliseconds, with the kinds of layers that real ones have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from condconv_surgery.layers import conditional_like
from condconv_surgery.recipe import CondConv, DynamicConv, Variant


class SmallNet(nn.Module):
    """Convolution, norm, dropout, a conditional convolution and a head, for images of any size."""

    def __init__(
        self, variant: Variant | None = None, classes: int = 5, norm: bool = True, dropout: float = 0.1
    ) -> None:
        super().__init__()
        inner = nn.Conv2d(8, 8, 3, padding=1)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8)
        self.inner = inner if variant is None else conditional_like(inner, variant)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.inner(x))
        return self.head(self.dropout(x.mean((2, 3))))


def small_net(
    variant: Variant | None = None, *, seed: int = 0, norm: bool = True, classes: int = 5, dropout: float = 0.1
) -> SmallNet:
    """A ``SmallNet`` whose weights are a function of ``seed``."""
    torch.manual_seed(seed)
    return SmallNet(variant, classes, norm, dropout)


VARIANTS: list[Variant | None] = [None, CondConv(experts=3), DynamicConv(experts=2)]
