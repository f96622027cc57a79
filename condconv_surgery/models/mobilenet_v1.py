"""MobileNetV1 with width multipliers (Howard et al. 2017, arXiv 1704.04861): the network of CondConv's cost figure.

torchvision has none. Names, batch norm and initialisation are those of its MobileNetV2: ``features.0`` is the stem,
``features.1`` to ``features.13`` are the separable blocks, ``classifier.1`` is the last layer. CondConv converts the
blocks from the sixth on, and the classifier: ``include=list(CONDCONV_LAYERS), classifier=True``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import InputSpec, Recipe, Source, attach_recipe

BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Output channels at width 1 and stride of each separable block."""

CONDCONV_LAYERS = ("features.[6-9].*", "features.1[0-3].*", "classifier.1")
"""``include`` of Yang et al. 2019: from the sixth separable block on, with the classifier."""

MAX_WIDTH = 16.0
"""A file may name a width; at this one the network takes 4 GB."""


class MobileNetV1(nn.Module):
    """A stem, 13 blocks of a depthwise 3x3 and a 1x1 convolution, global average pooling, one linear layer.

        channels = width * (32, 64, 128, 128, 256, 256, 6 x 512, 2 x 1024), multiples of 8

    See ``mobilenet_v1`` for the arguments.
    """

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        dropout: float = 0.0,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        _check(width, num_classes, in_channels, dropout, stem_stride)
        inputs = scaled_channels(32, width)
        features = [_convolution(in_channels, inputs, 3, stem_stride)]
        for channels, stride in BLOCKS:
            outputs = scaled_channels(channels, width)
            depthwise = _convolution(inputs, inputs, 3, stride, groups=inputs)
            features.append(nn.Sequential(depthwise, _convolution(inputs, outputs, 1)))
            inputs = outputs
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(inputs, num_classes))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, in_channels, H, W] -> logits [B, num_classes]."""
        pooled = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        logits: Tensor = self.classifier(torch.flatten(pooled, 1))
        return logits


def mobilenet_v1(
    width: float = 1.0,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    dropout: float = 0.0,
    stem_stride: int = 2,
) -> MobileNetV1:
    """MobileNetV1 with random weights, in train mode, carrying its recipe: a saved artifact rebuilds it by name.

    >>> model = mobilenet_v1(width=0.25, num_classes=10)
    >>> model.features[13][1][0].out_channels, model.classifier[1].out_features
    (256, 10)

    width: factor of all channels, above 0 and at most 16; the paper has 0.25, 0.5, 0.75 and 1.0. Channels are rounded
        to multiples of 8, as in torchvision.
    in_channels: of the images; 1 for grey ones.
    dropout: probability before the classifier.
    stem_stride: 2 halves the image first, as in the paper; 1 keeps small images (32 px) at a resolution of 2x2 or more.

    ImageNet (1.0): 569 M MACs, 4.2 M parameters. By name: ``load_model("condconv:mobilenet_v1_x0_25")``.

    Raises ``InputError`` for an argument out of range.
    """
    model = MobileNetV1(width, num_classes, in_channels, dropout=dropout, stem_stride=stem_stride)
    given = {
        "width": width,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "dropout": dropout,
        "stem_stride": stem_stride,
    }
    attach_recipe(model, Recipe(source=Source("condconv:mobilenet_v1", given), input=InputSpec(channels=in_channels)))
    return model


def scaled_channels(channels: int, width: float) -> int:
    """``width * channels`` rounded to a multiple of 8, at least 8 and at least 90% of the product.

    >>> [scaled_channels(32, width) for width in (0.125, 0.25, 0.4, 0.75, 1.0)]
    [8, 8, 16, 24, 32]
    """
    wanted = width * channels
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layers: nn.Sequential = Conv2dNormActivation(
        inputs, outputs, kernel, stride, groups=groups, activation_layer=nn.ReLU6
    )
    return layers


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)


def _check(width: float, num_classes: int, in_channels: int, dropout: float, stem_stride: int) -> None:
    if not _is_number(width) or not 0 < width <= MAX_WIDTH:
        allowed = f"It must be a number above 0 and at most {MAX_WIDTH:g}."
        raise InputError(f"width is {width!r}.", allowed, "width=0.25")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout!r}.", "It must be a number from 0 to 1, without 1.", "dropout=0.2")
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("stem_stride", stem_stride)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} is {value!r}.", "It must be a whole number of at least 1.", f"{name}=1")
    if stem_stride > 2:
        raise InputError(f"stem_stride is {stem_stride}.", "It must be 1 or 2.", "stem_stride=1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
