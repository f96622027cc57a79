"""A block whose conditional convolutions share one router.

Yang et al. 2019, section 3 and the released EfficientNet: the routing is computed once for each block, from the block's
input, and used by all its convolutions. That changes the data flow between the block's layers, so the forward of the
block becomes the code of a graph (``surgery.block_graph`` makes it). Everything else stays: the block is the same
object, an instance of its own class, with its children, attributes and hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, SupportsIndex

from torch import nn

from condconv_surgery.layers.graph_code import Forward, GraphCode
from condconv_surgery.layers.router_base import Router
from condconv_surgery.recipe import SharedRouter

ROUTER = "router"
"""The name of the router among the block's children."""


@dataclass(frozen=True)
class BlockRouting:
    """What turns a block into one that routes once. It can be pickled; the class that it makes cannot.

    plain: the block's own class. layers: the names, inside the block, of the layers that share the router.
    channels: of the block's input. in_eval, in_train: the code of the block's forward in either mode.
    """

    plain: type[nn.Module]
    layers: tuple[str, ...]
    channels: int
    in_eval: GraphCode
    in_train: GraphCode

    def make_class(self) -> type[RoutedBlock]:
        """A subclass of ``plain`` and of ``RoutedBlock``."""
        names = {
            "block_routing": self,
            "routed_eval": self.in_eval.function(),
            "routed_train": self.in_train.function(),
            "__module__": self.plain.__module__,
        }
        return type(f"Routed{self.plain.__name__}", (RoutedBlock, self.plain), names)


class RoutedBlock(nn.Module):
    """Mixed into the class of a block that routes once; its ``forward`` is made from a graph, one for each mode."""

    block_routing: ClassVar[BlockRouting]
    routed_eval: ClassVar[Forward]
    routed_train: ClassVar[Forward]

    router: Router

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block computes, with the mixture of the block's router given to its conditional layers."""
        if kwargs:  # the graph may have other names for its inputs
            args = inspect.signature(self.block_routing.plain.forward).bind(self, *args, **kwargs).args[1:]
        return self.routed_train(*args) if self.training else self.routed_eval(*args)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """As the block's own class does it, with its class, which exists in memory only, as a ``_RoutedClass``."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *state = reduced
        handle = _RoutedClass(type(self))
        return (_call, (function, *(handle if value is type(self) else value for value in arguments)), *state)


class _RoutedClass:
    """Stands for the class of a routed block in a pickle, which holds its routing; a deep copy has the same class."""

    def __init__(self, cls: type[RoutedBlock]) -> None:
        self.cls = cls

    def __reduce__(self) -> Any:
        return _routed_class, (self.cls.block_routing,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _RoutedClass:
        return self


def _routed_class(routing: BlockRouting) -> _RoutedClass:
    return _RoutedClass(routing.make_class())


def _call(function: Any, *arguments: Any) -> Any:
    return function(*(value.cls if isinstance(value, _RoutedClass) else value for value in arguments))


def add_block_router(block: nn.Module, layers: tuple[str, ...], channels: int, codes: dict[bool, GraphCode]) -> None:
    """Give ``block``, which has its ``ROUTER`` already, the forward that uses it, in place.

    layers, channels: see ``BlockRouting``. codes: of its forward by mode, ``False`` for eval and ``True`` for train.
    """
    block.__class__ = BlockRouting(type(block), layers, channels, codes[False], codes[True]).make_class()


def remove_block_router(block: nn.Module) -> None:
    """Undo ``add_block_router``, and remove the router."""
    assert isinstance(block, RoutedBlock)
    del block._modules[ROUTER]
    block.__class__ = block.block_routing.plain  # type: ignore[assignment]


def routed_blocks(model: nn.Module) -> dict[str, RoutedBlock]:
    """Every block of a model whose layers share a router, by its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedBlock)}


def shared_router_of(name: str, block: RoutedBlock) -> SharedRouter:
    """The router of the block of that name in a model, as a recipe has it."""
    routing = block.block_routing
    return SharedRouter(name, routing.channels, tuple(f"{name}.{layer}" for layer in routing.layers))


def plain_class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author wrote it."""
    return module.block_routing.plain if isinstance(module, RoutedBlock) else type(module)


@contextmanager
def plain_forwards(model: nn.Module) -> Iterator[None]:
    """Every block has the forward of its own class inside the ``with`` statement, in which its layers are plain."""
    classes = {block: type(block) for block in routed_blocks(model).values()}
    try:
        for block in classes:
            block.__class__ = block.block_routing.plain  # type: ignore[assignment]
        yield
    finally:
        for block, routed in classes.items():
            block.__class__ = routed
