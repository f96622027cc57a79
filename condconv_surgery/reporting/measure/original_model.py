"""The original of a converted model: plain layers swapped in temporarily, to measure "before"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from condconv_surgery.layers import ConditionalConv2d, plain_like
from condconv_surgery.layers.routed_block import plain_forwards


class Original:
    """A plain layer for every conditional one, with the mean of its experts as weight.

    Right after conversion that mean is the trained weight. The plain kernels take memory: one expert per layer.
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
        """Swap the plain layers in; on exit, swap the conditional layers back."""
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
    module, weight = plain_like(layer), layer.float_experts()
    module.weight = nn.Parameter(weight.mean(dim=0).view(module.weight.shape), requires_grad=False)
    if layer.bias is not None:
        module.bias = nn.Parameter(layer.bias.mean(dim=0), requires_grad=False)
    if layer.standardisation is not None and layer.standardisation.gain is not None:
        module.gain = nn.Parameter(layer.standardisation.gain.view_as(module.gain), requires_grad=False)  # type: ignore[arg-type]
    return module.train(layer.training)


def _put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    for name in names:
        model.set_submodule(name, module)
