"""Block-shared routing: which layers share a router, and the graph rewrite that makes them.

A *block* is the smallest module that is not the model itself nor a bare container (``nn.Sequential``, ``ModuleList``)
and holds more than one layer to convert: torchvision's ``BasicBlock``, ``Bottleneck``, ``InvertedResidual``, timm's
``InvertedResidual``. Or the user names blocks. One router sees the block's (first) input; its mixture goes to all the
layers. A layer outside of all blocks keeps its own router, and so does every layer of a block that cannot be traced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from condconv_surgery.errors import InputError, listed
from condconv_surgery.layers import ConditionalConv2d, ConvGeometry
from condconv_surgery.layers.graph_code import GraphCode
from condconv_surgery.layers.routed_block import ROUTER, add_block_router
from condconv_surgery.layers.router_base import make_router
from condconv_surgery.recipe import SharedRouter, as_argument, matches
from condconv_surgery.runtime.snapshot import preserving_state
from condconv_surgery.surgery.block_graph import (
    CONTAINERS,
    BlockError,
    Graphs,
    insert_router,
    nodes_calling,
    trace_block,
)
from condconv_surgery.surgery.conversion_plan import Plan
from condconv_surgery.surgery.observe.conv_sites import ConvSite
from condconv_surgery.surgery.observe.layer_calls import Calls, observe

CallsByMode = dict[bool, dict[str, Calls]]


def share_routers(model: nn.Module, plan: Plan, arguments: tuple[Any, ...], blocks: Sequence[str] = ()) -> Plan:
    """The plan with ``routers``, one for each block that routes once. Nothing is changed.

    blocks: see ``recipe.Selection``. Notes say which layers keep their own router, and why.
    Raises ``InputError`` when no block can share a router, or a pattern names no module.
    """
    members = _members(model, plan.to_convert, blocks)
    calls_by_mode = _observe_members(model, plan, members, arguments)
    routers: list[SharedRouter] = []
    unshared: dict[str, list[str]] = defaultdict(list)
    with preserving_state(model) as state:  # a traced block may write to what its parents hold
        for block, sites in members.items():
            try:
                routers.append(_shared_router(model, block, sites, calls_by_mode))
                if state.attributes_changed():
                    routers.pop()
                    raise BlockError(f"{block} writes to what its parents hold")
            except BlockError as error:
                unshared[str(error)] += [site.name for site in sites]
                state.restore()
    notes = tuple(f"a router of its own for {listed(names)}: {reason}" for reason, names in unshared.items())
    if not routers:
        raise InputError(
            f"No block of the model can share a router: {'; '.join(unshared)}.",
            "A block holds more than one converted layer and can be traced by torch.fx.",
            'blocks=["layer4.*"] names blocks, routing="layer" gives each layer its own router',
        )
    return replace(plan, routers=tuple(routers), notes=(*plan.notes, *notes))


def route_block(model: nn.Module, shared: SharedRouter) -> None:
    """Give a block of ``model`` its router and the forward that uses it, in place.

    Its conditional layers, without routers, must be in their places. Raises ``BlockError``, or ``AttributeError`` for a
    module that is not there; the block is then as it was.
    """
    block = model.get_submodule(shared.block)
    layers = [_conditional(model, name) for name in shared.layers]
    graphs = trace_block(block, layers)
    first = layers[0]
    geometry = ConvGeometry.make(shared.channels, shared.channels, 1)
    router = make_router(geometry, first.variant, first.weight.device, first.weight.dtype)
    router.train(block.training).requires_grad_(any(layer.weight.requires_grad for layer in layers))
    block.add_module(ROUTER, router)
    for graph in graphs.values():
        insert_router(graph, block, layers)
    inside = tuple(name.removeprefix(f"{shared.block}.") for name in shared.layers)
    add_block_router(block, inside, shared.channels, {mode: GraphCode.of(graph) for mode, graph in graphs.items()})


def _members(model: nn.Module, sites: Iterable[ConvSite], patterns: Sequence[str]) -> dict[str, list[ConvSite]]:
    """The sites of each block, by its name; under ``""`` those in none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [pattern for pattern in patterns if not any(matches(name, pattern) for name in modules if name)]
    if unknown:
        names = [name for name, module in modules.items() if name and any(True for _ in module.children())]
        raise InputError(
            f"{as_argument('blocks', unknown[:1])} names no module.",
            f"Modules are named like: {', '.join(names[:: max(len(names) // 3, 1)][:3])}.",
            'blocks=["layer4.*"]',
        )
    sites = [site for site in sites if not site.linear]
    converted = {id(site.module) for site in sites}
    members = defaultdict(list)
    for site in sites:
        members[_block_of(site.name, modules, converted, patterns)].append(site)
    return dict(members)


def _block_of(name: str, modules: Mapping[str, nn.Module], converted: set[int], patterns: Sequence[str]) -> str:
    while "." in name:
        name = name.rpartition(".")[0]
        if patterns:
            if any(matches(name, pattern) for pattern in patterns):
                return name
            continue
        bare = isinstance(modules[name], CONTAINERS)
        if not bare and sum(id(module) in converted for module in modules[name].modules()) > 1:
            return name
    return ""


def _observe_members(
    model: nn.Module, plan: Plan, members: Mapping[str, list[ConvSite]], arguments: tuple[Any, ...]
) -> CallsByMode:
    """The calls of blocks and of their layers in each mode in which the model runs."""
    observed = {name: model.get_submodule(name) for name in members if name}
    observed |= {site.name: site.module for sites in members.values() for site in sites}
    return {mode: observe(model, observed, arguments, mode) for mode in plan.modes}


def _shared_router(model: nn.Module, name: str, sites: list[ConvSite], calls_by_mode: CallsByMode) -> SharedRouter:
    """The router of a block. Raises ``BlockError`` when each of its layers needs its own."""
    if not name:
        raise BlockError("no block inside the model holds it")
    if len(sites) == 1:
        raise BlockError("no other converted layer of its block is left to share one")
    outside = [other for site in sites for other in site.names if not other.startswith(f"{name}.")]
    if outside:
        raise BlockError(f"a layer of its block is {outside[0]} too, outside of it")
    block = model.get_submodule(name)
    graphs = trace_block(block, [site.module for site in sites])
    shapes = [shape for calls in calls_by_mode.values() if name in calls for shape in calls[name].inputs]
    if not shapes or any(len(shape) != 4 for shape in shapes):
        raise BlockError("the first input of its block is not a feature map [B, C, H, W]")
    channels = {shape[1] for shape in shapes}
    if len(channels) > 1:
        raise BlockError(f"its block is called with {len(channels)} different numbers of channels")
    for site in sites:
        _require_same_calls(block, name, site, graphs, calls_by_mode)
    return SharedRouter(name, channels.pop(), tuple(site.name for site in sites))


def _require_same_calls(
    block: nn.Module, name: str, site: ConvSite, graphs: Graphs, calls_by_mode: CallsByMode
) -> None:
    """Every call of the layer comes from the block's forward, with the batch of the block's input."""
    for mode, calls in calls_by_mode.items():
        nodes = len(nodes_calling(graphs[mode], block, site.module))
        expected = [shape[0] for shape in calls[name].inputs] if name in calls else []
        batches = [shape[0] for shape in calls[site.name].inputs] if site.name in calls else []
        if len(batches) != nodes * len(expected):
            raise BlockError(f"{site.name} is called by others than the block's forward")
        if set(batches) - set(expected):
            raise BlockError(f"{site.name} sees a batch of another size than the block")


def _conditional(model: nn.Module, name: str) -> ConditionalConv2d[Any]:
    layer = model.get_submodule(name)
    if not isinstance(layer, ConditionalConv2d) or layer.router is not None:
        raise AttributeError(f"{name} is no conditional layer without a router")
    return layer
