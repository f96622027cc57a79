"""Layers and routers are single nodes of any ``torch.fx`` graph, whatever the tracer.

fx's own tracer traces through every module outside of ``torch.nn``, and would fail on the first shape check of a layer.
The documented solution is a subclass of the tracer, but passes such as those in ``torch.fx.experimental.optimization``
create their own tracers.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from condconv_surgery.errors import InputError


def is_traced(x: object) -> bool:
    """Whether ``x`` is a proxy in a graph that is being traced, not a tensor."""
    return isinstance(x, fx.Proxy)


def as_node(module: nn.Module, x: Any, *rest: Any) -> Any:
    """The call of ``module`` as a node of the graph that ``x`` belongs to.

    Raises ``InputError`` when the module has hooks, which the tracer has run already and the node would run again, and
    when the module is the root of the trace.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        raise InputError(
            f"This {type(module).__name__} has hooks, which a graph would run twice.",
            "It can be traced without them, or by a tracer for which it is a leaf.",
            "class Tracer(torch.fx.Tracer): is_leaf_module = lambda self, m, name: isinstance(m, ConditionalConv2d)",
        )
    path = x.tracer.path_of_module(module)
    if not path:
        raise InputError(
            f"This {type(module).__name__} is the whole model that is traced.",
            "A node is the call of a module that another one holds.",
            "torch.fx.symbolic_trace(nn.Sequential(layer))",
        )
    return x.tracer.create_proxy("call_module", path, (x, *rest), {})
