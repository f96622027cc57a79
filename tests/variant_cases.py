"""The variants over which the contract tests run: every registered one, with few and with many experts."""

from __future__ import annotations

import torch
from torch import nn

from condconv_surgery.layers import conditional_layers, routers
from condconv_surgery.recipe import VARIANTS, ODConv, Variant

EVERY_VARIANT: list[Variant] = [cls(experts=n) for cls in VARIANTS.values() for n in (1, 4)]
EVERY_VARIANT += [ODConv(experts=4, gates="sigmoid"), ODConv(experts=1, spatial=False)]


@torch.no_grad()
def scramble(layer: nn.Module, seed: int = 0) -> None:
    """Random routers and running statistics, and experts that differ, as in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    for inner in conditional_layers(layer).values():
        if inner.experts > 1 and torch.equal(inner.weight[0], inner.weight[1]):
            noise = torch.randn(inner.weight.shape, generator=generator).to(inner.weight) * 0.05
            inner.weight.add_(noise - noise.mean(0))  # the mean stays that of the original
    for router in routers(layer).values():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for name, buffer in router.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
