"""Report options that have no effect on this model. They are no errors: a comparison trains plain models too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from torch import nn

from condconv_surgery.layers import routers
from condconv_surgery.recipe.option_rules import Section
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.recipe.training_sections import DistillOptions, LayerOptions, ScheduleOptions
from condconv_surgery.training.monitor.run_metrics import temperature_of

CONDITIONAL_ONLY = ("router_lr", "expert_lr", "router_decay", "expert_decay", "expert_dropout", "balance", "sharpness")
"""Options of ``[layers]`` that concern only conditional layers."""


def unused_options(model: nn.Module, options: TrainingOptions) -> list[str]:
    """A line for each option that is set and has no effect on ``model``."""
    lines = []
    if options.schedule.temperature is not None and temperature_of(model) is None:
        lines.append("schedule.temperature: no effect: no layer has one. DynamicConv and ODConv layers do.")
    routed = _changed("layers", options.layers, LayerOptions(), CONDITIONAL_ONLY)
    if routed and not routers(model):
        lines.append(f"{routed}: no effect: no layer is conditional.")
    taught = _changed("distill", options.distill, DistillOptions(), asdict(options.distill))
    if taught and not options.distill.teacher:
        lines.append(f'{taught}: no effect without a teacher. distill.teacher="start" is the model before training.')
    annealed = _changed("schedule", options.schedule, ScheduleOptions(), ("temperature_end", "temperature_steps"))
    if annealed and options.schedule.temperature is None:
        lines.append(f"{annealed}: no effect without a first temperature, as in schedule.temperature=30.")
    return lines


def _changed(section: str, options: Section, plain: Section, names: Iterable[str]) -> str:
    """Those of ``names`` that differ from their defaults."""
    return ", ".join(f"{section}.{name}" for name in names if getattr(options, name) != getattr(plain, name))
