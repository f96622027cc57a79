"""Layers exchanged for stand-ins while a model is looked at, so that calls which would miss a replacement show.

A model can hold a layer where no exchange in the module tree reaches: in a plain list, a closure, a compiled function.
Called from there, the layer itself runs and not what stands in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

Named = Sequence[tuple[tuple[str, ...], nn.Module]]
"""Layers, each with all its names in the module tree."""


@contextmanager
def exchanged(model: nn.Module, layers: Named) -> Iterator[dict[str, nn.Module]]:
    """A stand-in at every name of each layer inside the block; yields them by the layers' first names.

    A stand-in is the layer but for its identity: it holds the same parameters, buffers and hooks. A hook of either is
    called for both, and told by its ``module`` which one ran.
    """
    stand_ins = {names[0]: _stand_in(module) for names, module in layers if names[0]}  # "" is the model itself
    try:
        for names, module in layers:
            _put(model, names, stand_ins.get(names[0], module))
        yield stand_ins
    finally:
        for names, module in layers:
            _put(model, names, module)


def _stand_in(module: nn.Module) -> nn.Module:
    twin = module.__new__(type(module))  # ``copy`` would ask the module, and a parametrized one refuses
    vars(twin).update(vars(module))
    return twin


def _put(model: nn.Module, names: tuple[str, ...], module: nn.Module) -> None:
    for name in names:
        if name:
            model.set_submodule(name, module)
