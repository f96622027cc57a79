"""Run a shallow clone of each layer: an original that is still called was reached through a list or closure.

A model can hold a layer where ``set_submodule`` cannot replace it: in a plain list, a closure, a compiled function.
Called from there, the original layer runs and not its clone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

NamedLayers = Sequence[tuple[tuple[str, ...], nn.Module]]
"""Layers, each with all its names in the module tree."""


@contextmanager
def run_clones(model: nn.Module, layers: NamedLayers) -> Iterator[dict[str, nn.Module]]:
    """Inside the block a clone stands at every name of each layer; yields the clones by the layers' first names.

    A clone differs from its layer by identity alone: it shares the dictionaries of parameters, buffers and hooks. A
    hook of either is called for both; its ``module`` argument says which one ran. Changes ``model``, so give it a copy
    of one in use.
    """
    clones = {names[0]: _clone(module) for names, module in layers if names[0]}  # "" is the model itself
    try:
        for names, module in layers:
            _put(model, names, clones.get(names[0], module))
        yield clones
    finally:
        for names, module in layers:
            _put(model, names, module)


def _clone(module: nn.Module) -> nn.Module:
    clone = module.__new__(type(module))  # ``copy.copy`` calls __reduce__, which raises for a parametrized module
    vars(clone).update(vars(module))
    return clone


def _put(model: nn.Module, names: tuple[str, ...], module: nn.Module) -> None:
    for name in names:
        if name:
            model.set_submodule(name, module)
