"""The optimizers of torch.optim by name."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from condconv_surgery.errors import unknown_name
from condconv_surgery.recipe.training_sections import LayerOptions, OptimizerOptions
from condconv_surgery.training.optimization.parameter_groups import parameter_groups

OPTIMIZERS: dict[str, type[Optimizer]] = {
    cls.__name__.lower(): cls
    for cls in vars(torch.optim).values()
    if isinstance(cls, type)
    and issubclass(cls, Optimizer)
    and cls.__name__ not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")  # a closure, sparse gradients, matrices only
}


def make_optimizer(
    model: nn.Module,
    options: OptimizerOptions,
    layers: LayerOptions = LayerOptions(),  # noqa: B008  # frozen
) -> Optimizer:
    """The optimizer that the options name, over the model's parameter groups.

    It is given ``lr``, and ``momentum`` or ``betas`` where it has them. Raises ``InputError`` for an unknown name.
    """
    cls = OPTIMIZERS.get(options.name.lower())
    if cls is None:
        raise unknown_name("optimizer", options.name, OPTIMIZERS, 'optimizer.name="adamw"')
    accepted = inspect.signature(cls).parameters
    optional: dict[str, Any] = {"momentum": options.momentum, "betas": options.betas}
    groups = parameter_groups(model, options, layers)
    if "weight_decay" not in accepted:  # Rprop
        groups = [{name: value for name, value in group.items() if name != "weight_decay"} for group in groups]
    return cls(groups, lr=options.lr, **{n: v for n, v in optional.items() if n in accepted})  # type: ignore[call-arg]
