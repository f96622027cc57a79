"""A graph's functional convolutions become modules, so that a graph is converted like any other model.

    y = F.conv2d(x, self.weight, self.bias)      ->      y = self.weight_conv(x)

A pass over a ``torch.fx.GraphModule`` like those in ``torch.fx``: it composes with other passes over nodes and
modules, before or after a conversion.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from condconv_surgery.surgery.conversion_plan import Skip

_SETTINGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


class _NotLiftedError(Exception):
    """A node cannot be lifted; the message is the reason."""


@dataclass(frozen=True)
class _Settings:
    """The arguments of ``F.conv2d`` beside its input; weight and bias by their names in the module."""

    weight: str
    bias: str | None
    stride: Any
    padding: Any
    dilation: Any
    groups: Any


def lift_convolutions(module: fx.GraphModule) -> tuple[Skip, ...]:
    """Rewrite every ``F.conv2d`` on a parameter of ``module`` as the call of an ``nn.Conv2d``, in place.

    Requires a graph as ``torch.fx.symbolic_trace`` makes it: a weight is a ``get_attr`` node that names an
    ``nn.Parameter``. Ensures an equal function; the same Parameter objects, with their ``requires_grad``, in modules
    called ``<weight>_conv`` (or in place of a module that held nothing else); calls with the same weight share one
    module; a graph that passes ``lint``, recompiled. Other nodes, and their ``meta``, are as before.

    Returns the weights whose convolutions are not lifted, each with its reason: the weight is used elsewhere too, is
    computed, or its calls differ.
    """
    groups: dict[str, list[fx.Node]] = {}
    skipped: list[Skip] = []
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is torch.conv2d:
            groups.setdefault(_weight_name(node), []).append(node)
    for name, nodes in groups.items():
        try:
            _lift(module, name, nodes)
        except _NotLiftedError as reason:
            skipped.append(Skip(name, f"F.conv2d in the graph: {reason}"))
    module.graph.lint()
    module.recompile()
    return tuple(skipped)


@contextmanager
def undone_on_error(module: fx.GraphModule) -> Iterator[None]:
    """Restore the graph and its dictionaries of parameters and modules when the block raises."""
    before = [(m, dict(m._parameters), dict(m._modules)) for m in module.modules()]
    graph = module.graph
    module.graph = copy.deepcopy(graph)  # the one to be changed
    try:
        yield
    except BaseException:
        for owner, parameters, modules in before:
            owner._parameters.clear()
            owner._parameters.update(parameters)
            owner._modules.clear()
            owner._modules.update(modules)
        module.graph = graph
        raise


def _arguments(node: fx.Node) -> dict[str, Any]:
    return {**_DEFAULTS, **dict(zip(_SETTINGS, node.args, strict=False)), **node.kwargs}


def _weight_name(node: fx.Node) -> str:
    """The parameter's name, or the node's where the weight is computed."""
    weight = _arguments(node)["weight"]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else node.name


def _lift(module: fx.GraphModule, name: str, nodes: list[fx.Node]) -> None:
    settings = {_settings(node) for node in nodes}
    if len(settings) > 1:
        raise _NotLiftedError("its calls differ in their settings")
    (one,) = settings
    tensors = [target for target in (one.weight, one.bias) if target is not None]
    for target in tensors:
        _require_sole_use(module, target, nodes)
    layer = _convolution(module, one)
    place = _module_name(module, one, tensors)
    for target in tensors:
        owner, _, attribute = target.rpartition(".")
        delattr(module.get_submodule(owner), attribute)
    module.set_submodule(place, layer) if "." in place else setattr(module, place, layer)
    for node in nodes:
        arguments = _arguments(node)
        with module.graph.inserting_before(node):
            call = module.graph.call_module(place, (arguments["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    for node in [n for n in module.graph.nodes if n.op == "get_attr" and n.target in tensors]:
        module.graph.erase_node(node)


def _settings(node: fx.Node) -> _Settings:
    arguments = _arguments(node)
    names: dict[str, str | None] = {}
    for key in ("weight", "bias"):
        value = arguments[key]
        if value is not None and (not isinstance(value, fx.Node) or value.op != "get_attr"):
            raise _NotLiftedError(f"its {key} is computed, not a parameter of the module")
        names[key] = None if value is None else str(value.target)
    rest = {key: arguments[key] for key in ("stride", "padding", "dilation", "groups")}
    fixed = {key: _pair(value) if isinstance(value, (list, tuple)) else value for key, value in rest.items()}
    if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(fixed)):
        raise _NotLiftedError("a setting of it is computed")
    assert names["weight"] is not None
    return _Settings(names["weight"], names["bias"], **fixed)


def _pair(values: Sequence[Any]) -> tuple[Any, ...]:
    """One value for height and width, as ``F.conv2d`` takes it, twice."""
    return (*values, *values) if len(values) == 1 else tuple(values)


def _require_sole_use(module: fx.GraphModule, target: str, nodes: list[fx.Node]) -> None:
    """The tensor is a parameter that nothing but ``nodes`` uses."""
    owner, _, attribute = target.rpartition(".")
    parameter = getattr(module.get_submodule(owner), attribute, None)
    if not isinstance(parameter, nn.Parameter):
        raise _NotLiftedError(f"{target} is not a parameter")
    places = [name for name, value in module.named_parameters(remove_duplicate=False) if value is parameter]
    readers = {user for n in module.graph.nodes if n.op == "get_attr" and n.target == target for user in n.users}
    called = [n for n in module.graph.nodes if n.op == "call_module" and f"{target}.".startswith(f"{n.target}.")]
    if len(places) > 1 or readers - set(nodes) or called:
        raise _NotLiftedError(f"{target} is used elsewhere too")


def _convolution(module: fx.GraphModule, settings: _Settings) -> nn.Conv2d:
    rest = asdict(settings)
    weight = module.get_parameter(rest.pop("weight"))
    bias = rest.pop("bias")
    if weight.dim() != 4:
        raise _NotLiftedError(f"its weight has {weight.dim()} dimensions")
    size = (weight.shape[2], weight.shape[3])
    inputs = weight.shape[1] * settings.groups
    layer = nn.Conv2d(inputs, weight.shape[0], size, bias=bias is not None, device="meta", **rest)
    layer.weight = weight
    if bias is not None:
        layer.bias = module.get_parameter(bias)
    return layer.train(module.training)


def _module_name(module: fx.GraphModule, settings: _Settings, tensors: list[str]) -> str:
    """The name of the new module: that of the owner of just these tensors, else a new one beside it."""
    owner = settings.weight.rpartition(".")[0]
    if owner and all(target.rpartition(".")[0] == owner for target in tensors):
        holder = module.get_submodule(owner)
        used = any(n.op == "call_module" and f"{n.target}.".startswith(f"{owner}.") for n in module.graph.nodes)
        names = [name for name, _ in holder.named_modules(remove_duplicate=False)]
        only_tensors = len(dict(holder.named_parameters())) == len(tensors) and not holder._buffers
        if not used and len(names) == 1 and only_tensors:
            return owner
    name = f"{settings.weight.replace('.', '_')}_conv"
    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(free for free in candidates if not hasattr(module, free))
