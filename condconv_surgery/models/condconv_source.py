"""``condconv:NAME``: the networks that this package defines. None has published weights."""

from __future__ import annotations

from torch import nn

from condconv_surgery.errors import unknown_name
from condconv_surgery.models.mobilenet_v1 import mobilenet_v1
from condconv_surgery.models.source_registry import named_source
from condconv_surgery.recipe import Source

WIDTHS = {
    "mobilenet_v1": 1.0,
    "mobilenet_v1_x0_25": 0.25,
    "mobilenet_v1_x0_5": 0.5,
    "mobilenet_v1_x0_75": 0.75,
}
"""Width of each name; the options of a source may give another."""


def _build(source: Source) -> nn.Module:
    name = source.name.partition(":")[2]
    if name not in WIDTHS:
        raise unknown_name("condconv model", name, WIDTHS, "condconv:mobilenet_v1")
    return mobilenet_v1(**{"width": WIDTHS[name], **source.options})


CONDCONV = named_source("condconv", _build, license=lambda source, model, published: "mit")
