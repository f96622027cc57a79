"""Learning rate and temperature as functions of the step: no state to save, exact after a resume."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import Optimizer

from condconv_surgery.layers import set_temperature
from condconv_surgery.recipe.training_sections import ScheduleOptions


def lr_factor(step: int, steps: int, options: ScheduleOptions) -> float:
    """The learning rate of a step (0 is the first) relative to the peak: linear warm-up, then the shape.

    Warm-up: ``(step + 1) / w`` for the first ``w = warmup * steps`` steps. Then, with t from 0 to 1, cosine:
    ``f + (1 - f) (1 + cos(pi t)) / 2`` with ``f = final_lr``; step: ``gamma`` to the number of milestones passed;
    constant: 1.

    >>> options = ScheduleOptions(warmup=0.2, final_lr=0.0)
    >>> [round(lr_factor(step, 10, options), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    warm = round(options.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if options.shape == "constant":
        return 1.0
    if options.shape == "step":
        return options.gamma ** sum(step * options.epochs >= epoch * steps for epoch in options.milestones)
    t = (step - warm) / max(steps - warm, 1)
    return options.final_lr + (1 - options.final_lr) * (1 + math.cos(math.pi * t)) / 2


def temperature_at(step: int, steps: int, options: ScheduleOptions) -> float | None:
    """The temperature of a step, linear from ``temperature`` to ``temperature_end``; ``None``: no annealing.

    >>> options = ScheduleOptions(temperature=30.0, temperature_steps=0.5)
    >>> [temperature_at(step, 100, options) for step in (0, 25, 50, 99)]
    [30.0, 15.5, 1.0, 1.0]
    """
    if options.temperature is None:
        return None
    falling = options.temperature_steps * steps
    t = min(step / falling, 1.0) if falling else 1.0
    return options.temperature + (options.temperature_end - options.temperature) * t


def apply_schedule(model: nn.Module, optimizer: Optimizer, step: int, steps: int, options: ScheduleOptions) -> float:
    """Set the learning rate of each group and the temperature of each router; returns the factor of the rate."""
    factor = lr_factor(step, steps, options)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    apply_temperature(model, step, steps, options)
    return factor


def apply_temperature(model: nn.Module, step: int, steps: int, options: ScheduleOptions) -> None:
    """Set the temperature of each router to that of the step; without annealing, nothing."""
    temperature = temperature_at(step, steps, options)
    if temperature is not None:
        set_temperature(model, temperature)
