"""A small converted network and its report, for tests of the output formats."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from condconv_surgery import ODConv, convert, report
from condconv_surgery.recipe import InputSpec, Recipe, attach_recipe
from condconv_surgery.reporting import Report
from tests.images import write_images
from tests.variant_cases import scramble

SPEC = InputSpec(3, 32, 32, (0.5,) * 3, (0.25,) * 3)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16)]
    body += [nn.ReLU(), nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)]
    model = nn.Sequential(*body).eval()
    attach_recipe(model, Recipe(input=SPEC, classes=("class0", "class1", "class2")))
    return model


def measure(folder: Path) -> Report:
    """The report of a model with varying gates on 18 images of 3 classes, written into ``folder``."""
    model = convert(network(), ODConv(4), prove=False).model
    scramble(model)
    return report(model, data=write_images(folder, classes=3, each=6))


def shown(renderable: object, width: int = 80) -> str:
    console = Console(width=width, highlight=False, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]
