"""Copies of a model that share tensors where a full copy would waste memory."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from condconv_surgery.errors import InputError, one_line
from condconv_surgery.layers.routed_block import remove_block_router
from condconv_surgery.runtime.modes import restore_modes
from condconv_surgery.runtime.snapshot import held_tensors
from condconv_surgery.surgery.conversion_plan import Plan
from condconv_surgery.surgery.upcycle import has_hooks, move_hooks

Places = list[tuple[str, nn.Module]]
"""Modules by the names at which they are, or were."""


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """``copy.deepcopy``, also of a model that holds tensors computed from its parameters: those as plain tensors.

    (A weight that ``torch.nn.utils.weight_norm`` or pruning computes before each call; losses in a list.) Every module
    is in the mode of its original: a ``__deepcopy__`` may build a new one, in train mode.
    """
    memo = {} if memo is None else memo
    for tensor in held_tensors(model):
        if not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    modes = {name: module.training for name, module in model.named_modules()}
    copied = copy.deepcopy(model, memo)
    for tree in (model, copied):  # they may share layers, which are in ``memo``
        restore_modes([(module, modes[name]) for name, module in tree.named_modules() if name in modes])
    return copied


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """A copy to run in any mode while ``model`` serves other threads: own modules and buffers, the same parameters.

    Only a forward that writes to its own parameters is seen by the original until the pass ends.
    Raises ``InputError`` for a model that ``copy.deepcopy`` does not take.
    """
    try:
        return copy_of(model, {id(parameter): parameter for parameter in model.parameters()})
    except Exception as error:  # a lock, an open file, whatever a __deepcopy__ raises
        raise InputError(
            f"The model cannot be copied: {one_line(error)}",
            "Planning and proof run a copy, so that a model in use is not disturbed.",
            "inplace=True",
        ) from error


def copy_to_change(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy that holds the layers to be replaced themselves: their weights are not copied in vain.

    Layers with hooks are copied: a hook may be the method of a module that is copied.
    """
    layers = [model.get_submodule(site.name) for site in plan.to_convert]
    return copy_of(model, {id(layer): layer for layer in layers if not has_hooks(layer)})


def original_of(model: nn.Module, plan: Plan, replaced: Places) -> nn.Module:
    """A copy of what the converted ``model`` was, without ever copying its experts."""
    memo: dict[int, Any] = {}
    for name, module in replaced:
        layer = model.get_submodule(name)
        if id(layer) not in memo:
            memo[id(layer)] = _copy_with_hooks_of(layer, module, memo)
    original = copy_of(model, memo)
    for router in plan.routers:
        remove_block_router(original.get_submodule(router.block))
    return original


def _copy_with_hooks_of(layer: nn.Module, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of ``module`` with the hooks that went to ``layer``, which keeps them."""
    move_hooks(layer, module)
    try:
        return copy_of(module, memo)
    finally:
        move_hooks(module, layer)
