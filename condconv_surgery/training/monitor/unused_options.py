"""Options that can do nothing for a model: said, for a comparison may train converted and plain models alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from torch import nn

from condconv_surgery.layers import routers
from condconv_surgery.recipe.option_rules import Section
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.recipe.training_sections import DistillOptions, LayerOptions, ScheduleOptions
from condconv_surgery.training.monitor.meter import temperature_of

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
        lines.append("schedule.temperature: no effect, for no layer has one. DynamicConv and ODConv layers have.")
    routed = _given("layers", options.layers, LayerOptions(), OF_ROUTED)
    if routed and not routers(model):
        lines.append(f"{routed}: no effect, for no layer is conditional.")
    taught = _given("distill", options.distill, DistillOptions(), asdict(options.distill))
    if taught and not options.distill.teacher:
        lines.append(f"{taught}: no effect without a teacher. --distill start is the model as it begins.")
    annealed = _given("schedule", options.schedule, ScheduleOptions(), ("temperature_end", "temperature_steps"))
    if annealed and options.schedule.temperature is None:
        lines.append(f"{annealed}: no effect without a first temperature, as in --temperature 30.")
    return lines


def _given(section: str, options: Section, plain: Section, names: Iterable[str]) -> str:
    """Which of ``names`` are not as they are without a word."""
    return ", ".join(f"{section}.{name}" for name in names if getattr(options, name) != getattr(plain, name))
