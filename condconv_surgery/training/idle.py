"""Options that can do nothing for a model: said, for a comparison may train converted and plain models alike."""

from __future__ import annotations

from torch import nn

from condconv_surgery.layers import routers
from condconv_surgery.recipe.sections import LayerOptions
from condconv_surgery.recipe.training import TrainingOptions
from condconv_surgery.training.meter import temperature_of

OF_ROUTED = (
    "router_lr",
    "expert_lr",
    "router_decay",
    "expert_decay",
    "expert_dropout",
    "balance",
    "sharpness",
)
"""Options of ``[layers]`` that concern conditional layers alone, and need not be refused without any."""


def idle_options(model: nn.Module, options: TrainingOptions) -> list[str]:
    """A line for each option that is set and meets nothing in ``model``."""
    lines = []
    if options.schedule.temperature is not None and temperature_of(model) is None:
        lines.append("schedule.temperature changes nothing: no layer has one. DynamicConv and ODConv layers have.")
    plain = LayerOptions()
    given = [name for name in OF_ROUTED if getattr(options.layers, name) != getattr(plain, name)]
    if given and not routers(model):
        lines.append(f"{', '.join(f'layers.{name}' for name in given)}: nothing, for no layer is conditional.")
    return lines
