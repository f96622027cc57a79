"""The distinct convolutions of a torchvision model, with their input size and count."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torchvision
from torch import nn

from condconv_surgery.layers import ConvGeometry
from condconv_surgery.layers.conv2d_subclasses import geometry_of

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
QUICK = (  # one of each kind: dense at a large and a small map, 1x1 at both, depthwise at both
    "resnet18 3x3 64->64 @56",
    "resnet18 3x3 256->256 @14",
    "resnet18 3x3 512->512 @7",
    "resnet18 1x1/2 128->256 @28",
    "resnet50 1x1 512->2048 @7",
    "mobilenet_v2 1x1 24->144 @56",
    "mobilenet_v2 1x1 160->960 @7",
    "mobilenet_v2 3x3 dw 192->192 @28",
    "mobilenet_v2 3x3 dw 960->960 @7",
)


@dataclass(frozen=True)
class Site:
    """One convolution of a model: geometry, input height and width, number of occurrences."""

    model: str
    geometry: ConvGeometry
    size: tuple[int, int]
    count: int

    def __str__(self) -> str:
        g = self.geometry
        stride = "" if g.stride == (1, 1) else f"/{g.stride[0]}"
        dilation = "" if g.dilation == (1, 1) else f" dilation {g.dilation[0]}"
        kind = " dw" if g.depthwise else f" {g.groups} groups" if g.groups > 1 else ""
        kernel = f"{g.kernel_size[0]}x{g.kernel_size[1]}{stride}{dilation}{kind}"
        return f"{self.model} {kernel} {g.in_channels}->{g.out_channels} @{self.size[0]}"

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image, approximately: padding is not counted."""
        return self.geometry.weight_numel * math.prod(
            n // s for n, s in zip(self.size, self.geometry.stride, strict=True)
        )

    def conv(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` of this geometry, without bias."""
        g = self.geometry
        return nn.Conv2d(
            g.in_channels, g.out_channels, g.kernel_size, g.stride, g.padding, g.dilation, g.groups, bias=False
        )


def sites(models: tuple[str, ...] = MODELS, pixels: int = 224) -> list[Site]:
    """Every distinct convolution of these torchvision models."""
    found = []
    for name in models:
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None).eval()
        counts = Counter((geometry_of(conv), size) for conv, size in calls_of_convolutions(model, pixels))
        found += [Site(name, geometry, size, count) for (geometry, size), count in counts.items()]
    return found


def calls_of_convolutions(model: nn.Module, pixels: int) -> list[tuple[nn.Conv2d, tuple[int, int]]]:
    """Each call of a convolution by a model on the meta device, and the size of its input.

    Except the stem and those on pooled features, which ``convert`` skips too.
    """
    calls: list[tuple[nn.Conv2d, tuple[int, int]]] = []

    def note(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        height, width = arguments[0].shape[2:]
        if module.in_channels > 3 and (height, width) != (1, 1):
            calls.append((module, (height, width)))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.device("meta"):
        model(torch.empty(1, 3, pixels, pixels))
    return calls
