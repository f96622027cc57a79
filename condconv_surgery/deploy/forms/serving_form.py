"""The model that is exported: batch norms folded, routers compact, each conditional layer in its form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from condconv_surgery.deploy.compact_routers import make_routers_compact
from condconv_surgery.deploy.fold_batch_norm import fold
from condconv_surgery.deploy.forms.computed_kernel import ComputedKernel
from condconv_surgery.deploy.forms.constant_kernels import ConstantKernels
from condconv_surgery.deploy.forms.graph_forms import CONSTANT, choose_forms, layer_cases
from condconv_surgery.layers import ConditionalConv2d, conditional_layers
from condconv_surgery.layers.find_layers import folded_layers, named_layers, require_exact_experts
from condconv_surgery.surgery.copy_model import copy_of


class ServingForm(NamedTuple):
    """The model, the form of each conditional layer by its name, and whether the graph is for one image in a loop."""

    model: nn.Module
    forms: dict[str, str]
    in_a_loop: bool


def serving_form(
    model: nn.Module,
    *,
    form: str,
    preferred: Sequence[str],
    batch: int | None,
    loops: bool = False,
) -> ServingForm:
    """A copy of ``model``, which is in eval mode, for a graph.

    form, preferred: see ``graph_forms.choose_forms``. batch: that of the graph, None for any. loops: whether the graph
    may be for one image, in a loop over those of any batch.
    Only for tracing at that batch: the copy has no training mode and cannot be saved.
    """
    require_exact_experts(model, 'A file is made from exact experts: export(quantize="int8") rounds its own.')
    served = copy_of(model)
    if not conditional_layers(served):
        return ServingForm(served, {}, False)
    if not folded_layers(served):
        fold(served, inplace=True, prove=False)  # whoever exports compares the outputs
    in_a_loop = batch is None and loops and _in_a_loop(served, form, preferred)
    cases = layer_cases(served, 1 if in_a_loop else batch)
    forms = choose_forms(cases, form, preferred)
    make_routers_compact(served)
    for names, layer in named_layers(served, ConditionalConv2d):
        name = names[0]
        if forms[name] in CONSTANT:
            _replace(served, names, ConstantKernels(layer, by_position=forms[name] == "taps"))
        elif forms[name] == "kernel":
            _replace(served, names, ComputedKernel(layer))
        else:
            layer.implementation = cases[name].implementation(forms[name])
    return ServingForm(served, forms, in_a_loop)


def _in_a_loop(model: nn.Module, form: str, preferred: Sequence[str]) -> bool:
    """Whether a graph for any batch is one for a single image in a loop: there a mixed kernel is an input of a plain
    convolution. Static layers are faster in batches, so by default only where most layers are conditional."""
    if form != "auto":
        return form == "kernel"
    static = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return (
        len(conditional_layers(model)) >= static
        and "kernel" in choose_forms(layer_cases(model, 1), form, preferred).values()
    )


def _replace(model: nn.Module, names: Sequence[str], layer: nn.Module) -> None:
    """``layer``, in eval mode, in the places ``names``."""
    layer.eval()
    for name in names:
        model.set_submodule(name, layer)
