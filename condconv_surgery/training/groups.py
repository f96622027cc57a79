"""Which parameters share a learning rate and a weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, conditional_layers
from condconv_surgery.recipe.training import OptimizerOptions


@dataclass(frozen=True)
class Role:
    """What a parameter is for. ``experts``: kernels of a conditional layer; ``router``: what chooses among them."""

    kind: str  # weight | bias | norm | experts | router

    @property
    def decays(self) -> bool:
        """Weight decay pulls kernels and matrices only: a norm, a bias or a router at zero is no simpler function."""
        return self.kind in ("weight", "experts")


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter by its first name."""
    kinds: dict[int, str] = {}
    for layer in conditional_layers(model).values():
        kinds.update({id(p): "router" for p in layer.router.parameters()})
        kinds[id(layer.weight)] = "experts"
    for module in model.modules():
        if isinstance(module, ConditionalConv2d):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            kinds.setdefault(id(parameter), _kind(module, name, parameter.dim()))
    return {name: Role(kinds.get(id(p), "bias")) for name, p in model.named_parameters()}


def parameter_groups(model: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Groups for a torch optimizer; each has ``lr``, ``base_lr``, ``weight_decay`` and a ``name``.

    Raises ``InputError`` when nothing can be trained.
    """
    groups: dict[str, dict[str, Any]] = {}
    found = roles(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = found[name]
        group = groups.setdefault(
            role.kind,
            {
                "params": [],
                "name": role.kind,
                "lr": options.lr,
                "base_lr": options.lr,
                "weight_decay": options.weight_decay if role.decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise InputError(
            "No parameter of the model can be trained.",
            "At least one must have requires_grad=True.",
            "model.requires_grad_()",
        )
    return list(groups.values())


def _kind(module: nn.Module, name: str, dims: int) -> str:
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)):
        return "norm"
    return "weight" if dims > 1 else "bias"
