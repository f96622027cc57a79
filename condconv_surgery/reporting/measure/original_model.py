"""The plain network that a converted one came from, put back for a moment: what "before" is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from condconv_surgery.layers import ConditionalConv2d, plain_like
from condconv_surgery.layers.routed_block import plain_forwards


class Original:
    """Plain layers for every place of a conditional one, each with the mean of its experts.

    Right after a conversion that mean is the trained weight itself. The plain kernels take memory of their own, one
    expert's worth for each layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._places: dict[ConditionalConv2d[Any], list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, ConditionalConv2d) and name:
                self._places.setdefault(module, []).append(name)
        self._plain = {layer: mean_of_experts(layer) for layer in self._places}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The plain layers in the model, then the conditional ones again."""
        try:
            for layer, names in self._places.items():
                _put(self.model, names, self._plain[layer])
            with plain_forwards(self.model):
                yield
        finally:
            for layer, names in self._places.items():
                _put(self.model, names, layer)


@torch.no_grad()
def mean_of_experts(layer: ConditionalConv2d[Any]) -> nn.Conv2d | nn.Linear:
    """The plain layer of the same geometry, mode, device and dtype, with the mean of the experts."""
    module, weight = plain_like(layer), layer.weight
    module.weight = nn.Parameter(weight.mean(dim=0).view(module.weight.shape), requires_grad=False)
    if layer.bias is not None:
        module.bias = nn.Parameter(layer.bias.mean(dim=0), requires_grad=False)
    if layer.standardisation is not None and layer.standardisation.gain is not None:
        module.gain = nn.Parameter(layer.standardisation.gain.view_as(module.gain), requires_grad=False)  # type: ignore[arg-type]
    return module.train(layer.training)


def _put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    for name in names:
        model.set_submodule(name, module)
