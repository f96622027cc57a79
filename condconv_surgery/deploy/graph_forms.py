"""The forms of a conditional layer in an exported graph, all the same function for every batch.

form     what the graph holds                                                    possible for
scale    one static convolution, inputs and outputs scaled for each channel      one expert without spatial attention
sum      static convolutions of all experts, outputs gated and added             no spatial attention
matmul   kernels mixed; 1x1 as a batched MatMul, k x k as unfold and MatMul      kernels that differ between images
"""

from __future__ import annotations

from typing import Any

from torch import nn

from condconv_surgery.deploy.mean_mixtures import mixture_of_zeros
from condconv_surgery.errors import InputError, unknown_name
from condconv_surgery.layers import ConditionalConv2d, routers
from condconv_surgery.layers.find_layers import named_layers, routed_layers
from condconv_surgery.ops.implementations import why_not
from condconv_surgery.ops.mixture import Mixture

FORMS = {"scale": ("static",), "sum": ("mix-outputs",), "matmul": ("bmm", "unfold")}
"""The implementations of each form, of which the first possible one is taken."""

AUTO = ("static", "bmm", "mix-outputs", "unfold")
"""The first possible one of these was the fastest of the three forms in ONNX Runtime on a CPU."""

EVERY_BATCH = 2
"""Stands for any batch: what is possible for two images is possible for more, and these forms for one as well."""


def choose_forms(model: nn.Module, form: str = "auto") -> dict[str, str]:
    """Set the implementation of each conditional layer of ``model``, in place; returns the form of each by its name.

    Raises ``InputError`` for an unknown form, or one that some layer cannot have.
    """
    if form not in ("auto", *FORMS):
        raise unknown_name("form", form, ["auto", *FORMS], 'form="auto"')
    mixtures = {name: mixture_of_zeros(router) for name, router in routers(model).items()}
    by_layer = {id(layer): mixtures[name] for name, layers in routed_layers(model).items() for layer in layers}
    form_of = {implementation: name for name, names in FORMS.items() for implementation in names}
    chosen = {}
    for (name, *_), layer in named_layers(model, ConditionalConv2d):
        layer.implementation = _implementation(name, layer, by_layer[id(layer)], form)
        chosen[name] = form_of[layer.implementation]
    return chosen


def _implementation(name: str, layer: ConditionalConv2d[Any], mixture: Mixture, form: str) -> str:
    wanted = AUTO if form == "auto" else FORMS[form]
    reasons = {own: why_not(own, EVERY_BATCH, mixture, layer.geometry) for own in AUTO}
    for own in wanted:
        if reasons[own] is None:
            return own
    works = [one for one, names in FORMS.items() if any(reasons[own] is None for own in names)]
    raise InputError(
        f'{name} cannot have form="{form}": {reasons[wanted[-1]]}.',
        f"Possible for it: {', '.join(works)}.",
        'form="auto", which chooses for each layer',
    )
