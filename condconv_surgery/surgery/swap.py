"""Put conditional layers in the place of a plan's layers, and undo it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers.routed_block import ROUTER, RoutedBlock, remove_block_router
from condconv_surgery.layers.router_base import Router
from condconv_surgery.recipe import Upcycling, Variant
from condconv_surgery.surgery.block_graph import BlockError
from condconv_surgery.surgery.block_routing import route_block
from condconv_surgery.surgery.conversion_plan import Plan
from condconv_surgery.surgery.copy_model import Places
from condconv_surgery.surgery.upcycle import move_hooks, start_of, start_router, upcycle


def swap(
    model: nn.Module, plan: Plan, variant: Variant, upcycling: Upcycling, features: Mapping[str, Tensor] | None = None
) -> Places:
    """Put a conditional layer at every name of each site, and the routers in their blocks; returns the old layers.

    features: pooled features by the first name of the layer or block that has a router (``upcycle.start_router``).

    Raises ``InputError`` when a block cannot get its router; the model is then as it was.
    """
    features = features or {}
    shared = {name for router in plan.routers for name in router.layers}
    layers: Places = []
    replaced: Places = []
    for site in plan.to_convert:
        module = model.get_submodule(site.name)
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        routing: Literal["layer", "block"] = "block" if site.name in shared else "layer"
        layer = upcycle(module, replace(variant, routing=routing), upcycling, site.name, features.get(site.name))
        layers += [(name, layer) for name in site.names]
        replaced += [(name, module) for name in site.names]
    _put(model, layers)
    for router in plan.routers:
        try:
            route_block(model, router)
            if start_of(variant, upcycling) != "noise":
                made = model.get_submodule(f"{router.block}.{ROUTER}")
                assert isinstance(made, Router)
                start_router(made, router.channels, upcycling, router.block, features.get(router.block))
        except BlockError as error:
            restore(model, plan, replaced)
            raise InputError(
                f"{router.block} cannot share a router: with its layers converted, {error}.",
                "torch.fx must trace it with conditional layers in it too.",
                f'routing="layer", or exclude=["{router.block}.*"]',
            ) from error
    return replaced


def restore(model: nn.Module, plan: Plan, replaced: Places) -> None:
    """Undo ``swap``, also when it stopped halfway."""
    for router in plan.routers:
        block = model.get_submodule(router.block)
        if isinstance(block, RoutedBlock):
            remove_block_router(block)
    _put(model, replaced)


def _put(model: nn.Module, places: Places) -> None:
    """Put each module at its name; it takes over the hooks of the module that was there."""
    for name, module in {id(module): (name, module) for name, module in places}.values():
        move_hooks(model.get_submodule(name), module)
    for name, module in places:
        model.set_submodule(name, module)
