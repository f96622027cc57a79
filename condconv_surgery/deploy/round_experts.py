"""``round_experts``: a conditional network that holds its experts in int8 or bfloat16, and mixes them as they are.

    int8        w[e,o] = scale[e,o] * q[e,o],  scale[e,o] = max |w[e,o]| / 127: four experts weigh as one float32 kernel
    bfloat16    half of float32

At batch 1 reading the experts is the limit of a conditional layer, so this saves time as well as memory where the
compiled kernels serve (``native``). Elsewhere each call converts the experts first, which takes time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, conditional_layers
from condconv_surgery.layers.find_layers import named_layers, require_exact_experts
from condconv_surgery.layers.weight_forms.rounded_weight import RoundedWeight
from condconv_surgery.models.artifact.rounded_experts import SCALE, rounded_tensors
from condconv_surgery.runtime.wrappers import unwrapped
from condconv_surgery.surgery.copy_model import copy_of

Rounded = Literal["int8", "bfloat16"]


@dataclass(frozen=True)
class ExpertRounding:
    """What ``round_experts`` did.

    model: in eval mode, of the original's own class. error: the largest difference of a weight.
    bytes_before, bytes_after: of the experts, with their scales.
    """

    model: nn.Module = field(repr=False)
    precision: str
    layers: int
    error: float
    bytes_before: int
    bytes_after: int


@torch.no_grad()
def round_experts(model: nn.Module, precision: Rounded = "int8", *, inplace: bool = False) -> ExpertRounding:
    """Hold the experts of each conditional layer in int8 or bfloat16, for inference.

        served = cs.round_experts(cs.fold(model).model, "int8").model

    Routers, biases, norms and plain layers stay exact. The weights are those that ``save(precision=...)`` writes. The
    result runs as any model does, on any device. It is for serving: ``finetune``, ``fold``, ``collapse``, ``export``
    and ``save`` need exact experts and refuse it.

    inplace: change ``model`` itself instead of a copy.

    Raises ``InputError`` for a model without conditional layers or with weights that are not finite, for one that is
    rounded already, and where no experts would get smaller.
    """
    if precision not in get_args(Rounded):
        raise InputError(
            f"precision is {precision!r}.", f"It must be one of: {', '.join(get_args(Rounded))}.", 'precision="int8"'
        )
    model = unwrapped(model)
    if not conditional_layers(model):
        raise InputError(
            "The model has no conditional layer.", "Only experts are rounded.", "convert(model, CondConv(experts=4))"
        )
    require_exact_experts(model, "They are rounded once, from exact ones.")
    experts = {names[0]: layer.weight.detach() for names, layer in named_layers(model, ConditionalConv2d)}
    try:
        rounded, record = rounded_tensors(experts, list(experts), precision)
    except InputError as error:  # whose advice is for a file
        raise InputError(error.given, error.allowed, "the model as it is") from None
    served = model if inplace else copy_of(model)
    for name, layer in conditional_layers(served).items():
        if name in record.dtypes:
            _hold(layer, rounded[name], rounded.get(f"{name}{SCALE}"))
    served.eval()
    before = sum(weight.nbytes for weight in experts.values())
    return ExpertRounding(
        served, precision, len(record.dtypes), record.error, before, sum(t.nbytes for t in rounded.values())
    )


def _hold(layer: ConditionalConv2d[Any], weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    device = layer.weight.device
    layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
    layer.rounding = RoundedWeight(None if scale is None else scale.to(device)).train(layer.training)
