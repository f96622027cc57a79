"""The fixed cost of a layer: batch 1 and so small a map that Python and the calls between the steps are most of it."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.protocol import Spread
from benchmarks.timing import interleaved
from condconv_surgery.layers import conditional_like
from condconv_surgery.recipe import CondConv, ODConv, Variant

CHANNELS, PIXELS, SECONDS = 16, 4, 0.03
VARIANTS: dict[str, Variant] = {
    "condconv4": CondConv(experts=4),
    "odconv1": ODConv(experts=1),
    "odconv4": ODConv(experts=4),
}


def measure_overhead(repeats: int) -> dict[str, Spread]:
    """Time of each layer over that of its ``nn.Conv2d`` (3x3, in eval mode, without autograd), within a turn."""
    plain = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1).eval()
    layers: dict[str, nn.Module] = {"static": plain}
    layers |= {name: conditional_like(plain, variant).eval() for name, variant in VARIANTS.items()}
    x = torch.randn(1, CHANNELS, PIXELS, PIXELS)
    with torch.no_grad():
        times = interleaved({name: lambda layer=layer: layer(x) for name, layer in layers.items()}, repeats, SECONDS)
    static = times.pop("static")
    return {name: Spread.of([a / b for a, b in zip(of, static, strict=True)]) for name, of in times.items()}
