"""Statistics of the attention of one layer, ODConv's scales, over labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from condconv_surgery.errors import counted
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.reporting.images.routing_statistics import share_between_classes


@dataclass(frozen=True)
class LayerAttention:
    """How much the scales ``s`` [N, K] of one layer differ between N images; at the start of a conversion each is 1.

    spread: standard deviation over the images, mean over all scales. channels, filters, positions: the same of the
        scales of input channels, filters and kernel positions; ``None`` where the layer has none.
    between: share of the variance that lies between classes, 0 to 1; the rest is within them. 0 without variance.
    """

    name: str
    spread: float
    channels: float | None
    filters: float | None
    positions: float | None
    between: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_attention(name: str, mixture: Mixture, labels: Tensor, classes: int) -> LayerAttention:
    """The statistics of the scales in ``mixture``, of which there are some, for images with ``labels`` [N]."""
    parts = (mixture.in_scale, mixture.out_scale, mixture.spatial)
    rows = [None if part is None else part.flatten(1).double() for part in parts]
    channels, filters, positions = (None if part is None else _spread(part) for part in rows)
    scales = torch.cat([part for part in rows if part is not None], dim=1)
    between = share_between_classes(scales, labels, classes, least=1e-12 * scales.shape[1])
    return LayerAttention(name, _spread(scales), channels, filters, positions, between)


def _spread(scales: Tensor) -> float:
    """The standard deviation over the images, mean over all scales. scales: [N, K]."""
    return float(scales.std(dim=0, correction=0).mean())


def attention_line(layers: Sequence[LayerAttention]) -> str:
    """One sentence: how much the scales differ between images on average, and in which layer most."""
    most = max(layers, key=lambda layer: layer.spread)
    mean = sum(layer.spread for layer in layers) / len(layers)
    kinds = {"input channels": most.channels, "filters": most.filters, "positions": most.positions}
    parts = ", ".join(f"{kind} {value:.3f}" for kind, value in kinds.items() if value is not None)
    count = counted(len(layers), "layer")
    return (
        f"Attention: scales vary between images by {mean:.3f} on average over {count} (standard deviation; 0: the "
        f"same for all images), most in {most.name}: {parts}; the class explains {most.between:.0%} of it."
    )
