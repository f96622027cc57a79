"""A block whose conditional convolutions share one router.

Yang et al. 2019, section 3 and the released EfficientNet: one routing for each block, of the block's input, used by all
its convolutions. The data flow between the block's layers changes, so its forward becomes the code of a graph
(``surgery.block_graph`` makes it); everything else of the block stays: it is the same object, an instance of its own
class, with its children, attributes and hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from condconv_surgery.layers.router import Router

Forward = Callable[..., Any]

ROUTER = "router"
"""The name of the router among the block's children."""


class RoutedBlock(nn.Module):
    """Mixed into the class of a block that routes once; its ``forward`` is made from a graph, one for each mode.

    routed_from: the block's own class. routed_layers: the names, inside the block, of the layers that it routes for.
    routed_channels: of the block's input. A block of such a class, which is made in memory, cannot be pickled:
    ``condconv_surgery.save`` writes it.
    """

    routed_from: ClassVar[type[nn.Module]]
    routed_layers: ClassVar[tuple[str, ...]]
    routed_channels: ClassVar[int]
    routed_eval: ClassVar[Forward]
    routed_train: ClassVar[Forward]

    router: Router

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block computes, its conditional layers given the mixture of the block's router."""
        if kwargs:  # a graph names its inputs as it likes
            args = inspect.signature(self.routed_from.forward).bind(self, *args, **kwargs).args[1:]
        return self.routed_train(*args) if self.training else self.routed_eval(*args)


def route_once(block: nn.Module, layers: tuple[str, ...], channels: int, in_eval: Forward, in_train: Forward) -> None:
    """Give ``block``, which holds its ``ROUTER`` already, the forward that uses it, in place.

    layers, channels: see ``RoutedBlock``. in_eval, in_train: called with the block and its inputs, in either mode.
    """
    plain = type(block)
    names = {
        "routed_from": plain,
        "routed_layers": layers,
        "routed_channels": channels,
        "routed_eval": in_eval,
        "routed_train": in_train,
        "__module__": plain.__module__,
    }
    block.__class__ = type(f"Routed{plain.__name__}", (RoutedBlock, plain), names)


def route_no_more(block: nn.Module) -> None:
    """Undo ``route_once``, and take the router out."""
    assert isinstance(block, RoutedBlock)
    del block._modules[ROUTER]
    block.__class__ = block.routed_from  # type: ignore[assignment]


def routed_blocks(model: nn.Module) -> dict[str, RoutedBlock]:
    """Every block of a model that routes once for its layers, by its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedBlock)}


def plain_class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author knows it."""
    return module.routed_from if isinstance(module, RoutedBlock) else type(module)


@contextmanager
def plain_forwards(model: nn.Module) -> Iterator[None]:
    """Every block with the forward of its own class, for as long as plain layers stand in it."""
    classes = {block: type(block) for block in routed_blocks(model).values()}
    try:
        for block in classes:
            block.__class__ = block.routed_from  # type: ignore[assignment]
        yield
    finally:
        for block, routed in classes.items():
            block.__class__ = routed
