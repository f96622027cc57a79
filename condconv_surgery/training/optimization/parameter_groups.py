"""Parameter groups by learning rate and weight decay; frozen layers; parameters trained while routers warm up."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from condconv_surgery.errors import InputError, listed
from condconv_surgery.layers import conditional_layers, routers
from condconv_surgery.recipe.training_sections import LayerOptions, OptimizerOptions


def roles(model: nn.Module) -> dict[str, str]:
    """The role of each parameter by its first name: ``experts`` (kernels of a conditional layer), ``router``, ``norm``,
    ``weight`` or ``bias``."""
    kinds: dict[int, str] = {}
    for layer in conditional_layers(model).values():
        kinds.update({id(p): "experts" for p in layer.parameters(recurse=False) if p.dim() > 2})
        kinds.update({id(p): "bias" for p in layer.parameters(recurse=False) if p.dim() == 2})
    kinds.update({id(p): "router" for router in routers(model).values() for p in router.parameters()})
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            kinds.setdefault(id(parameter), _kind(module, parameter))
    return {name: kinds[id(p)] for name, p in model.named_parameters()}


def parameter_groups(
    model: nn.Module,
    options: OptimizerOptions,
    layers: LayerOptions = LayerOptions(),  # noqa: B008  # frozen
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each with ``params``, ``lr``, ``base_lr``, ``weight_decay`` and a ``name``.

    Routers and experts have their own factors of rate and decay; with ``layer_decay`` d, the i-th of n layers has the
    rate times ``d^((n - 1 - i) / (n - 1))``. Raises ``InputError`` when no parameter requires a gradient.
    """
    depth = _depths(model) if options.layer_decay < 1 else {}
    rate = {"router": layers.router_lr, "experts": layers.expert_lr}
    # Kernels and matrices decay by default; a norm or a bias at zero is not a simpler function.
    decay = {"router": layers.router_decay, "experts": layers.expert_decay, "weight": 1.0}
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    role_of = roles(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = role_of[name]
        lr = options.lr * rate.get(role, 1.0) * options.layer_decay ** (1 - depth.get(name, 1.0))
        made = {"params": [], "name": role, "lr": lr, "base_lr": lr}
        group = groups.setdefault((role, lr), {**made, "weight_decay": options.weight_decay * decay.get(role, 0.0)})
        group["params"].append(parameter)
    if not groups:
        frozen = f" layers.freeze={list(layers.freeze)!r} freezes all of them." if layers.freeze else ""
        raise InputError(
            f"No parameter of the model can be trained.{frozen}",
            "At least one must have requires_grad=True.",
            _less_frozen(model) if layers.freeze else "model.requires_grad_(True) where the model is made",
        )
    return list(groups.values())


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    """Freeze the layers that match a glob; returns them. Raises ``InputError`` when a pattern matches none."""
    return [layer.requires_grad_(False) for layer in _matching(model, patterns)]


@contextmanager
def preserving_frozen(model: nn.Module) -> Iterator[None]:
    """After the block the parameters are frozen that were so before it, and no others; a new head is not."""
    before = {name: p.shape for name, p in model.named_parameters() if not p.requires_grad}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            trained = before.get(name) != parameter.shape  # by name: sharding replaces parameters by others
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)


def frozen_note(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """A line about parameters that are frozen before a run and that no pattern of ``layers.freeze`` names."""
    named = {id(p) for layer in _matching(model, patterns) for p in layer.parameters()}
    frozen = {n: p.numel() for n, p in model.named_parameters() if not p.requires_grad and id(p) not in named}
    if not frozen:
        return []
    return [
        f"{sum(frozen.values()):,} parameters are frozen, as they came, and stay so: {listed([*frozen])}. "
        "requires_grad_(True) on a layer lets it learn."
    ]


def _matching(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    found = []
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(
                f'layers.freeze=["{pattern}"] matches none of {len(names)} layers.',
                f"They are named like: {', '.join(names[:3])}, {names[-1]}.",
                f'layers.freeze=["{names[0]}"]',
            )
        found += [model.get_submodule(name) for name in matched]
    return found


def _less_frozen(model: nn.Module) -> str:
    """Advice to freeze all modules but the last that has parameters."""
    *names, last = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters())
    top = last.partition(".")[0]
    tops = list(dict.fromkeys(name.partition(".")[0] for name in names if name.partition(".")[0] != top))
    kept = tops or names  # of a network in one module, all of its layers but the last
    return f"layers.freeze={kept!r}" if kept and all(kept) else "leave layers.freeze=... out"


def routing_parameters(model: nn.Module, heads: Iterable[str] = ()) -> list[nn.Parameter]:
    """The parameters trained while routers warm up: those of the routers and of the new heads.

    Raises ``InputError`` when there is no router, or all are frozen.
    """
    role_of = roles(model)
    learning = [name for name, p in model.named_parameters() if role_of[name] == "router" and p.requires_grad]
    if not learning:
        without = "whose routers are all frozen" if "router" in role_of.values() else "without routers"
        raise InputError(
            f"layers.warm_routers=... for a model {without}.",
            "It needs a converted model with a router that is not frozen.",
            "layers.warm_routers=0",
        )
    new = {id(p) for name in heads for p in model.get_submodule(name).parameters()}
    return [p for name, p in model.named_parameters() if name in learning or id(p) in new]


def _kind(module: nn.Module, parameter: nn.Parameter) -> str:
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)):
        return "norm"
    return "weight" if parameter.dim() > 1 else "bias"


def _depths(model: nn.Module) -> dict[str, float]:
    """The position of each parameter's layer in the order of definition, from 0 (first) to 1 (last)."""
    owners = list(dict.fromkeys(_owner(name) for name, _ in model.named_parameters()))
    depth = {owner: i / max(len(owners) - 1, 1) for i, owner in enumerate(owners)}
    return {name: depth[_owner(name)] for name, _ in model.named_parameters()}


def _owner(parameter: str) -> str:
    """Name of the layer that owns a parameter; a router is a part of its conditional layer."""
    return parameter.rpartition(".")[0].partition(".router")[0].partition(".standardisation")[0]
