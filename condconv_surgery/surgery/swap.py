"""Layers exchanged for conditional ones, and back; copies that do not take what is about to be replaced."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers.routed_block import RoutedBlock, remove_block_router
from condconv_surgery.recipe import Upcycling, Variant
from condconv_surgery.surgery.block_graph import BlockError
from condconv_surgery.surgery.block_routing import route_block
from condconv_surgery.surgery.select import Plan
from condconv_surgery.surgery.upcycle import has_hooks, move_hooks, upcycle

Places = list[tuple[str, nn.Module]]
"""Modules and where they are, or were."""


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """``copy.deepcopy``, also of a model with tensors that it has computed from its parameters: those as plain tensors.

    (``torch.nn.utils.weight_norm`` and pruning keep such a weight, and compute it again before each call.)
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, memo)


def copy_to_change(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy that has the original's own layers where they are about to be replaced: their weights are not copied in
    vain. (Those with hooks are, for a hook may be the method of a module that is copied.)"""
    layers = [site.module for site in plan.to_convert]
    return copy_of(model, {id(m): m for m in layers if not has_hooks(m)})


def original_of(model: nn.Module, plan: Plan, before: Places) -> nn.Module:
    """A copy of what ``model`` was, without ever copying its experts."""
    memo: dict[int, Any] = {}
    for name, module in before:
        layer = model.get_submodule(name)
        if id(layer) not in memo:
            memo[id(layer)] = _copy_with_hooks_of(layer, module, memo)
    original = copy_of(model, memo)
    for router in plan.routers:
        remove_block_router(original.get_submodule(router.block))
    return original


def swap(model: nn.Module, plan: Plan, variant: Variant, upcycling: Upcycling) -> Places:
    """Put conditional layers in place, the same one at every name of a site, and the routers of blocks; returns what
    was there.

    Raises ``InputError`` where a block cannot have its router after all; everything is then as it was.
    """
    shared = {name for router in plan.routers for name in router.layers}
    layers: Places = []
    before: Places = []
    for site in plan.to_convert:
        module = model.get_submodule(site.name)
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        routing: Literal["layer", "block"] = "block" if site.name in shared else "layer"
        layer = upcycle(module, replace(variant, routing=routing), upcycling, site.name)
        layers += [(name, layer) for name in site.names]
        before += [(name, module) for name in site.names]
    _put(model, layers)
    for router in plan.routers:
        try:
            route_block(model, router)
        except BlockError as error:
            restore(model, plan, before)
            raise InputError(
                f"{router.block} cannot share a router: with its layers converted, {error}.",
                "torch.fx must trace it with conditional layers in it too.",
                f'--routing layer, or --exclude "{router.block}.*"',
            ) from error
    return before


def restore(model: nn.Module, plan: Plan, before: Places) -> None:
    """Undo ``swap``, or the part of it that was done."""
    for router in plan.routers:
        block = model.get_submodule(router.block)
        if isinstance(block, RoutedBlock):
            remove_block_router(block)
    _put(model, before)


def _copy_with_hooks_of(layer: nn.Module, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of ``module`` with the hooks that went to ``layer``, which keeps them."""
    move_hooks(layer, module)
    try:
        return copy_of(module, memo)
    finally:
        move_hooks(module, layer)


def _put(model: nn.Module, places: Places) -> None:
    """Put modules in their places, each with the hooks of what was there."""
    for name, module in {id(module): (name, module) for name, module in places}.values():
        move_hooks(model.get_submodule(name), module)
    for name, module in places:
        model.set_submodule(name, module)
