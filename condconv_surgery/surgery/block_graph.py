"""A block as a graph with one router node, whose output is an argument of each conditional convolution in it.

A graph holds what the block did when it was traced. Where the next call could do something else, tracing raises
``BlockError``, so that a block becomes a graph only where the graph computes what the block computes:

- ``self.training``: traced in both modes, the block's mode picks the graph;
- the modules inside that hold no converted layer (norms, dropout, squeeze-and-excite) are called, not traced, and stay
  modules with all their settings; plain numbers among the block's own attributes become constants;
- not supported: decisions over values, random numbers and tensors made in forward, changes of gradient or autocast
  mode, hooks on modules that the graph inlines.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from condconv_surgery.errors import one_line
from condconv_surgery.layers.routed_block import ROUTER
from condconv_surgery.runtime.modes import in_mode
from condconv_surgery.runtime.snapshot import preserving_state, random_states
from condconv_surgery.surgery.fx_trace import LayerTracer
from condconv_surgery.surgery.upcycle import has_hooks

Graphs = dict[bool, fx.Graph]
"""By mode: ``False`` for eval, ``True`` for train."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Bare ones: a router would be one more member of theirs."""


class BlockError(Exception):
    """A block cannot become a graph; the message is the reason."""


def trace_block(block: nn.Module, layers: Collection[nn.Module]) -> Graphs:
    """The block's graph in each mode, ``layers`` and all modules without any of them as single nodes.

    Nothing is changed. Raises ``BlockError`` where a graph would not compute what the block computes.
    """
    _require_plain(block, layers)
    graphs: Graphs = {}
    for training in (False, True):
        with in_mode(block, training):
            graphs[training] = _trace(block, layers)
    return graphs


def nodes_calling(graph: fx.Graph, block: nn.Module, layer: nn.Module) -> list[fx.Node]:
    """The nodes that call ``layer``."""
    return [node for node in graph.nodes if node.op == "call_module" and block.get_submodule(str(node.target)) is layer]


def insert_router(graph: fx.Graph, block: nn.Module, layers: Collection[nn.Module]) -> None:
    """One router node on the first input; its mixture becomes the second argument of every call of ``layers``.

    The block must have its router already.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        mixture = graph.call_module(ROUTER, (inputs[0],))
    for layer in layers:
        for node in nodes_calling(graph, block, layer):
            node.args = (node.args[0], mixture)
    graph.lint()


def _require_plain(block: nn.Module, layers: Collection[nn.Module]) -> None:
    if isinstance(block, CONTAINERS):
        raise BlockError("it is a bare container, in which a router would be one more member")
    if hasattr(block, ROUTER):
        raise BlockError(f"it has an attribute {ROUTER!r} already")
    if "forward" in block.__dict__:
        raise BlockError("its forward was replaced on the object")
    for parameter in inspect.signature(block.forward).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            raise BlockError(f"its forward has an optional argument {parameter.name!r}")
    wanted = set(layers)
    for name, inner in block.named_modules():
        inlined = inner is not block and inner not in wanted and not wanted.isdisjoint(inner.modules())
        if inlined and has_hooks(inner):
            raise BlockError(f"{name} inside it has hooks, which a graph would not call")


def _trace(block: nn.Module, layers: Collection[nn.Module]) -> fx.Graph:
    with preserving_state(block) as state:
        before = random_states()
        try:
            graph = _Tracer(block, layers).trace(block)
        except BlockError:
            raise
        except Exception as error:  # whatever a user's forward raises when run on proxies
            raise BlockError(f"it cannot be traced: {one_line(error)}") from error
        if state.attributes_changed():
            raise BlockError("its forward makes tensors or attributes of its own")
        if random_states() != before:
            raise BlockError("its forward draws random numbers, which a graph would repeat")
    for layer in layers:
        for node in nodes_calling(graph, block, layer):
            if not node.args and list(node.kwargs) == ["input"]:
                node.args, node.kwargs = (node.kwargs["input"],), {}
            if len(node.args) != 1 or node.kwargs:
                raise BlockError(f"{node.target} is called with more than its input")
    return graph


def _gradient_and_autocast_modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


class _Tracer(LayerTracer):
    """Raises ``BlockError`` where the forward changes a mode that a graph does not keep."""

    def __init__(self, block: nn.Module, layers: Collection[nn.Module]) -> None:
        super().__init__(block, layers)
        self._modes = _gradient_and_autocast_modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _gradient_and_autocast_modes() != self._modes:
            raise BlockError("its forward changes the gradient or autocast mode, which a graph does not keep")
        return super().create_node(*args, **kwargs)
