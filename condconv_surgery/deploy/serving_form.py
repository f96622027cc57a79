"""The model that is exported: batch norms folded, routers compact, each conditional layer in its form."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from condconv_surgery.deploy.compact_routers import make_routers_compact
from condconv_surgery.deploy.constant_kernels import ConstantKernels
from condconv_surgery.deploy.fold_batch_norm import fold
from condconv_surgery.deploy.graph_forms import CONSTANT, choose_forms, layer_cases
from condconv_surgery.layers import ConditionalConv2d, conditional_layers
from condconv_surgery.layers.find_layers import folded_layers, named_layers, require_exact_experts
from condconv_surgery.surgery.copy_model import copy_of


def serving_form(
    model: nn.Module, *, form: str, preferred: Sequence[str], batch: int | None
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of ``model``, which is in eval mode, for a graph; and the form of each conditional layer by its name.

    form, preferred: see ``graph_forms.choose_forms``. batch: that of the graph, None for any.
    Only for tracing at that batch: the copy has no training mode and cannot be saved.
    """
    require_exact_experts(model, 'A file is made from exact experts: export(quantize="int8") rounds its own.')
    served = copy_of(model)
    if not conditional_layers(served):
        return served, {}
    if not folded_layers(served):
        fold(served, inplace=True, prove=False)  # whoever exports compares the outputs
    cases = layer_cases(served, batch)
    forms = choose_forms(cases, form, preferred)
    make_routers_compact(served)
    for names, layer in named_layers(served, ConditionalConv2d):
        name = names[0]
        if forms[name] in CONSTANT:
            constant = ConstantKernels(layer, by_position=forms[name] == "taps").eval()
            for own in names:
                served.set_submodule(own, constant)
        else:
            layer.implementation = cases[name].implementation(forms[name])
    return served, forms
