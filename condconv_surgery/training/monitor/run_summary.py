"""What a run trains, before its first step, and what it reached, at its end: a few lines each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from condconv_surgery.data.evaluation_images import data_to_measure
from condconv_surgery.errors import counted
from condconv_surgery.layers import ConditionalConv2d, conditional_layers
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.batches.samplers import Steps
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.state.progress import TrainingResult


def start_lines(
    model: nn.Module, options: TrainingOptions, spec: InputSpec, steps: Steps, world: World
) -> tuple[str, str]:
    """The model and where it runs; its steps and their learning rate."""
    layers, parameters = list(conditional_layers(model).values()), list(model.parameters())
    size, trained = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
    part = "" if trained == size else f", {trained:,} of them trained"
    processes = f" in {world.size} processes" if world.size > 1 else ""
    epochs, optimizer = options.schedule.epochs, options.optimizer
    return (
        f"Model: {options.model or type(model).__name__}{_layers(layers)}, {size:,} parameters{part}; "
        f"{options.engine.precision} on {world.device}{processes}.",
        f"Steps: {steps.steps} in {counted(epochs, 'epoch')}, of {steps.batch_size} images "
        f"{spec.height}x{spec.width}; {optimizer.name}, learning rate {optimizer.lr:g}.",
    )


def best_line(result: TrainingResult) -> str:
    """The best epoch, the last one where it is another, and the file; what is known of a run that has no epoch."""
    if result.best_top1 is None:
        return "No epoch was completed: there is no model yet."
    last = "" if result.epochs == result.best_epoch or result.top1 is None else f", last {result.top1:.4f}"
    return (
        f"Best top-1 {result.best_top1:.4f} in epoch {result.best_epoch}{last} "
        f"({result.val_images} validation images): {result.output}/best.safetensors"
    )


def next_call(result: TrainingResult, needs_code: bool = False) -> str:
    """The call that reports on the run's best model; empty when the run was stopped or has no model."""
    if result.best_top1 is None or result.stopped_by:
        return ""
    code = ", model=MyNet()" if needs_code else ""
    data = data_to_measure(result.output)
    return f'report(load("{result.output}/best.safetensors"{code}), data="{data}")'


def _layers(layers: Sequence[ConditionalConv2d[Any]]) -> str:
    if not layers:
        return ""
    counts = sorted({layer.experts for layer in layers})
    experts = f"{counts[0]} to {counts[-1]} experts" if len(counts) > 1 else counted(counts[0], "expert")
    return f" with {counted(len(layers), 'conditional layer')} of {experts}"
