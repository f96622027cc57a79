"""A ``torch.fx`` tracer that goes through the modules that hold a wanted layer; every other module is one node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any

from torch import fx, nn


class LayerTracer(fx.Tracer):
    """Traces ``model`` or one of its modules; ``layers`` are nodes.

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
