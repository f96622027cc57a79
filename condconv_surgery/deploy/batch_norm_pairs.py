"""Which batch norm follows which conditional convolution, and takes nothing else, by ``torch.fx``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from condconv_surgery.layers import ConditionalLinear, conditional_layers
from condconv_surgery.layers.conv2d_subclasses import full_name
from condconv_surgery.surgery.conversion_plan import Skip
from condconv_surgery.surgery.fx_trace import LayerTracer, traced_parts
from condconv_surgery.surgery.upcycle import has_hooks

PLAIN_NORMS = (
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
    "torchvision.ops.misc.FrozenBatchNorm2d",
)
"""Classes that, in eval mode, compute a scale and a shift of each channel."""

ACTIVATED_NORM = "timm.layers.norm_act.BatchNormAct2d"
"""The same, and then its children ``drop`` and ``act``."""


@dataclass(frozen=True)
class Pair:
    """A conditional convolution and the batch norm that alone takes its output, by their first names."""

    layer: str
    norm: str


@dataclass
class _Uses:
    """What the traced graphs do with the modules of one model; modules by identity.

    readers: for each layer, what takes its output in each of its calls: a norm, or the reason why folding cannot.
    inputs: for each norm, the layer whose output each of its calls takes; None for anything else.
    untraced: modules that could not be traced, and why.
    """

    readers: dict[int, list[int | str]] = field(default_factory=dict)
    inputs: dict[int, list[int | None]] = field(default_factory=dict)
    weights_read: set[int] = field(default_factory=set)
    untraced: dict[str, str] = field(default_factory=dict)


def batch_norm_pairs(model: nn.Module) -> tuple[list[Pair], list[Skip]]:
    """Every conditional layer of ``model``, which is in eval mode: paired with its batch norm, or why it is not."""
    layers, names = conditional_layers(model), {id(m): name for name, m in model.named_modules()}
    modules = {id(module): module for module in model.modules()}
    norms = [module for module in modules.values() if _is_norm(module)]
    uses, tracer = _Uses(), LayerTracer(model, [*layers.values(), *norms])
    for _, inside, graph in traced_parts(model, tracer, uses.untraced):
        _read(graph, inside, tracer, uses)
    pairs, skips = [], []
    for name, layer in layers.items():
        reader = _only_reader(layer, uses)
        if isinstance(reader, int):
            reader = _reason_against(layer, modules[reader], uses) or reader
        if isinstance(reader, int):
            pairs.append(Pair(name, names[reader]))
        else:
            skips.append(Skip(name, reader))
    return pairs, skips


def _is_norm(module: nn.Module) -> bool:
    name = full_name(type(module))
    return name in PLAIN_NORMS or name == ACTIVATED_NORM


def _only_reader(layer: nn.Module, uses: _Uses) -> int | str:
    """The norm that takes the output of each call of the layer, or the reason why there is no such norm."""
    readers = uses.readers.get(id(layer))
    if readers is None:
        reasons = list(uses.untraced.values())
        return f"not traced: {reasons[0]}" if reasons else "not called in a forward pass"
    reasons = [reader for reader in readers if isinstance(reader, str)]
    if reasons:
        return reasons[0]
    return readers[0] if len(set(readers)) == 1 else "another batch norm follows in each of its calls"


def _reason_against(layer: Any, norm: nn.Module, uses: _Uses) -> str:
    """Why the norm cannot be folded into the layer; empty when it can."""
    checks = (
        ("its kernels are standardised after they are scaled", layer.standardisation is not None),
        ("it is a Linear", isinstance(layer, ConditionalLinear)),
        ("a batch norm is folded into it already", layer.ungated_bias is not None),
        ("the batch norm behind takes other outputs too", set(uses.inputs[id(norm)]) != {id(layer)}),
        ("the batch norm behind has no running statistics", getattr(norm, "running_mean", None) is None),
        ("hooks see what lies between it and the batch norm behind", has_hooks(layer) or has_hooks(norm)),
        ("its weight or that of the batch norm is read elsewhere", bool({id(layer), id(norm)} & uses.weights_read)),
    )
    return next((reason for reason, holds in checks if holds), "")


def _read(graph: fx.Graph, modules: dict[str, nn.Module], tracer: LayerTracer, uses: _Uses) -> None:
    def called(node: Any) -> nn.Module | None:
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        module = modules[str(node.target)] if is_call else None
        return module if module is not None and tracer.is_wanted(module) else None

    for node in graph.nodes:
        module = called(node)
        if node.op == "get_attr":
            uses.weights_read |= {id(owner) for owner in _owners(str(node.target), modules)}
        elif module is not None and _is_norm(module):
            source = called(node.args[0]) if node.args else None
            uses.inputs.setdefault(id(module), []).append(None if source is None else id(source))
        elif module is not None:
            followers = [called(user) for user in node.users]
            norm = followers[0] if len(followers) == 1 else None
            found: int | str = id(norm) if norm is not None and _is_norm(norm) else _what_follows(node, modules)
            uses.readers.setdefault(id(module), []).append(found)


def _owners(target: str, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """The modules around a parameter, from the innermost."""
    while target:
        target = target.rpartition(".")[0]
        if target in modules:
            yield modules[target]


def _what_follows(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if len(node.users) != 1:
        return f"{len(node.users)} operations take its output, not a batch norm alone"
    user = next(iter(node.users))
    if user.op == "output":
        return "its output is that of its block, which could not be traced further"
    what = type(modules[str(user.target)]).__name__ if user.op == "call_module" else str(user.target)
    return f"no batch norm follows, but {getattr(user.target, '__name__', what)}"
