"""A block whose conditional convolutions share one router.

Yang et al. 2019, section 3 and the released EfficientNet: one routing for each block, of the block's input, used by all
its convolutions. The data flow between the block's layers changes, so its forward becomes the code of a graph
(``surgery.block_graph`` makes it); everything else of the block stays: it is the same object, an instance of its own
class, with its children, attributes and hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from condconv_surgery.layers.routing import Router

Forward = Callable[..., Any]

ROUTER = "router"
"""The name of the router among the block's children."""


class RoutedBlock(nn.Module):
    """Mixed into the class of a block that routes once; its ``forward`` is made from a graph, one for each mode.

    A block of such a class, made in memory, cannot be pickled: ``condconv_surgery.save`` writes it.
    """

    plain_class: ClassVar[type[nn.Module]]
    in_eval: ClassVar[Forward]
    in_train: ClassVar[Forward]

    router: Router

    def forward(self, *args: Any) -> Any:
        """What the block computes, its conditional layers given the mixture of the block's router."""
        return self.in_train(*args) if self.training else self.in_eval(*args)


def route_once(block: nn.Module, router: Router, in_eval: Forward, in_train: Forward) -> None:
    """Give ``block`` a router and another forward, in place.

    in_eval, in_train: called with the block and its inputs, in eval and in train mode.
    """
    plain = type(block)
    block.add_module(ROUTER, router)
    names = {"plain_class": plain, "in_eval": in_eval, "in_train": in_train, "__module__": plain.__module__}
    block.__class__ = type(f"Routed{plain.__name__}", (RoutedBlock, plain), names)


def route_no_more(block: nn.Module) -> None:
    """Undo ``route_once``."""
    assert isinstance(block, RoutedBlock)
    del block._modules[ROUTER]
    block.__class__ = block.plain_class


def routed_blocks(model: nn.Module) -> dict[str, RoutedBlock]:
    """Every block of a model that routes once for its layers, by its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedBlock)}


def plain_class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author knows it."""
    return module.plain_class if isinstance(module, RoutedBlock) else type(module)


@contextmanager
def plain_forwards(model: nn.Module) -> Iterator[None]:
    """Every block with the forward of its own class, for as long as plain layers stand in it."""
    classes = {block: type(block) for block in routed_blocks(model).values()}
    try:
        for block in classes:
            block.__class__ = block.plain_class
        yield
    finally:
        for block, routed in classes.items():
            block.__class__ = routed
