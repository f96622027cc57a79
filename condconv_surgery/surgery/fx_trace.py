"""Tracing by ``torch.fx``: a tracer that stops at the wanted layers, and what takes the output of each of them.

``trace_followers`` runs only for callers that ask (a printed plan): a conversion does not need it. Where a module
cannot be traced, its children are traced instead.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from condconv_surgery.errors import listed, one_line
from condconv_surgery.runtime.modes import without_forward_hooks
from condconv_surgery.runtime.snapshot import preserving_state


class LayerTracer(fx.Tracer):
    """Traces ``model`` or one of its modules through what holds a layer of ``layers``; all other modules are nodes.

    fx patches ``nn.Module.__call__`` and ``__getattr__`` for the whole process while it traces; what other threads call
    and read goes past the tracer.
    """

    def __init__(self, model: nn.Module, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self._wanted = {id(layer) for layer in layers}
        self._containers = {id(m) for m in model.modules() if any(id(sub) in self._wanted for sub in m.modules())}
        self._thread = threading.get_ident()

    def is_wanted(self, module: nn.Module) -> bool:
        return id(module) in self._wanted

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str = "") -> bool:
        return id(m) in self._wanted or id(m) not in self._containers

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val  # a model in use shares its parameters with the traced copy
        return super().getattr(attr, attr_val, parameter_proxy_cache)


@dataclass
class Followers:
    """by_layer: for each layer name, the class or function names that take its output; traced layers only.
    untraceable: for each module that could not be traced (``""`` is the whole model), the reason in one line.
    """

    by_layer: dict[str, tuple[str, ...]] = field(default_factory=dict)
    untraceable: dict[str, str] = field(default_factory=dict)

    def notes(self) -> tuple[str, ...]:
        """One line for each reason, however many modules have it."""
        names: dict[str, list[str]] = {}
        for name, reason in self.untraceable.items():
            names.setdefault(reason, []).append(name or "the whole model")
        return tuple(f"not traced: {listed(modules)}: {reason}" for reason, modules in names.items())


def trace_followers(model: nn.Module, layers: Collection[nn.Module]) -> Followers:
    """Trace the whole model, else its children, down to ``layers`` themselves; ``model`` is unchanged afterwards.

    Hooks are not called: they would see proxies.
    """
    followers, tracer = Followers(), LayerTracer(model, layers)
    for prefix, modules, graph in traced_parts(model, tracer, followers.untraceable):
        for node in graph.nodes:
            if node.op == "call_module" and tracer.is_wanted(modules[str(node.target)]):
                name = f"{prefix}.{node.target}" if prefix else str(node.target)
                followers.by_layer.setdefault(name, tuple(_consumer(user, modules) for user in node.users))
    return followers


def traced_parts(
    model: nn.Module, tracer: LayerTracer, untraceable: dict[str, str]
) -> Iterator[tuple[str, dict[str, nn.Module], fx.Graph]]:
    """The graph of the whole model, else those of its children, with the name of the part and its modules by name.

    Hooks are not called, they would see proxies; ``model`` is unchanged after the last one. untraceable: gets the parts
    that cannot be traced, and why.
    """
    with preserving_state(model), without_forward_hooks(model):  # a child may write to what its parent holds
        yield from _parts(model, "", tracer, untraceable)


def _parts(
    module: nn.Module, name: str, tracer: LayerTracer, untraceable: dict[str, str]
) -> Iterator[tuple[str, dict[str, nn.Module], fx.Graph]]:
    if tracer.is_leaf_module(module):
        return
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # they have no forward to trace
        try:
            with preserving_state(module):  # a forward may store what it computes: here, proxies
                graph = tracer.trace(module)
        except Exception as error:  # whatever a user's forward raises when run on proxies
            untraceable[name] = one_line(error)
        else:
            yield name, dict(module.named_modules(remove_duplicate=False)), graph
            return
    for child_name, child in module.named_children():
        yield from _parts(child, f"{name}.{child_name}" if name else child_name, tracer, untraceable)


def _consumer(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__
    if node.op == "call_function":
        is_add = node.target in (operator.add, operator.iadd, torch.add)
        return "add" if is_add else getattr(node.target, "__name__", str(node.target))
    return "output" if node.op == "output" else str(node.target)
