"""Networks that train in milliseconds, with the kinds of layers that real ones have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.layers import conditional_like
from condconv_surgery.recipe import CondConv, DynamicConv, Variant
from tests.variant_cases import scramble


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


class Mixed(nn.Module):
    """Every kind of layer that has another form: k x k, 1x1, depthwise, strided, with and without a norm behind."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()

        def conditional(*shape: int, **options: Any) -> nn.Module:
            return conditional_like(nn.Conv2d(*shape, **options), variant)

        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.expand = conditional(8, 16, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.depthwise = conditional(16, 16, 3, padding=1, groups=16)
        self.dense = conditional(16, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.expand(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.dense(self.depthwise(x))).mean((2, 3)))


def mixed(variant: Variant) -> nn.Module:
    """A scrambled ``Mixed`` in eval mode."""
    torch.manual_seed(0)
    model = Mixed(variant).eval()
    scramble(model)
    return model


class Amplifies(nn.Module):
    """A network whose outputs keep three digits in float32, as deep ones can: the sum rounds to ``at``'s last digit."""

    def __init__(self, network: nn.Module, at: float) -> None:
        super().__init__()
        self.network, self.at = network, at

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + self.at - self.at
