"""The fx side: what the graph says of each layer, as far as the model can be traced.

The tracer goes through modules that contain layers of interest and keeps every other one a leaf: fewer ways to fail,
and nothing baked in that is not needed. A module that cannot be traced is left, and its children are tried instead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from condconv_surgery.errors import one_line
from condconv_surgery.runtime.snapshot import preserving_state


@dataclass
class Traces:
    """What tracing found.

    followed_by: for each layer name, the class or function names that take its output.
    untraceable: for each module that could not be traced (``""`` is the whole model), the reason in one line.
    """

    followed_by: dict[str, tuple[str, ...]] = field(default_factory=dict)
    untraceable: dict[str, str] = field(default_factory=dict)


def trace(model: nn.Module, layers: Collection[nn.Module]) -> Traces:
    """Trace the whole model, else its children, down to the layers themselves."""
    traces = Traces()
    wanted = {id(layer) for layer in layers}
    containers = {id(m) for m in model.modules() if any(id(sub) in wanted for sub in m.modules())}
    _descend(model, "", wanted, containers, traces)
    return traces


def _descend(module: nn.Module, name: str, wanted: set[int], containers: set[int], traces: Traces) -> None:
    if id(module) in wanted or id(module) not in containers:
        return
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # they have no forward to trace
        try:
            with preserving_state(module):  # a forward may keep what it computes: here, proxies
                graph = _Tracer(wanted, containers).trace(module)
        except Exception as error:  # whatever a user's forward raises when run on proxies
            traces.untraceable[name] = one_line(error)
        else:
            _read(graph, module, name, wanted, traces)
            return
    for child_name, child in module.named_children():
        _descend(child, f"{name}.{child_name}" if name else child_name, wanted, containers, traces)


def _read(graph: fx.Graph, root: nn.Module, prefix: str, wanted: set[int], traces: Traces) -> None:
    modules = dict(root.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "call_module" and id(modules.get(node.target)) in wanted:
            name = f"{prefix}.{node.target}" if prefix else str(node.target)
            traces.followed_by.setdefault(name, tuple(_consumer(user, modules) for user in node.users))


def _consumer(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__
    if node.op == "call_function":
        return _function_name(node.target)
    return "output" if node.op == "output" else str(node.target)


def _function_name(target: Callable[..., Any] | str) -> str:
    if target in (operator.add, operator.iadd, torch.add):
        return "add"
    return getattr(target, "__name__", str(target))


class _Tracer(fx.Tracer):
    def __init__(self, wanted: set[int], containers: set[int]) -> None:
        super().__init__()
        self._wanted = wanted
        self._containers = containers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._wanted or id(m) not in self._containers
