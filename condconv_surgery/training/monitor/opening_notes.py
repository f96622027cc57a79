"""What a run says about its model and its options before the first step."""

from __future__ import annotations

from torch import nn

from condconv_surgery.models.artifact.save_load import why_not_alone
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.classifier_heads import output_notes
from condconv_surgery.training.head_order import is_reordered
from condconv_surgery.training.monitor.unused_options import unused_options
from condconv_surgery.training.optimization.parameter_groups import frozen_note
from condconv_surgery.training.optimization.weight_average import average_note


def opening_notes(
    model: nn.Module, spec: InputSpec, options: TrainingOptions, heads: dict[str, int], steps: int
) -> list[str]:
    """One line each: new heads, outputs that are no logits, frozen parameters, how files load, a short average, options
    without effect."""
    lines = [f"New head {name}: {width} classes." for name, width in heads.items()]
    lines += output_notes(model, spec)
    lines += frozen_note(model, options.layers.freeze)
    if reason := why_not_alone(model):
        lines.append(f"The files of this run need load(path, model=MyNet()): {reason}.")
    lines += average_note(options.engine.ema, steps)
    return lines + unused_options(model, options)


def renamed_note(before: tuple[str, ...], classes: tuple[str, ...], heads: dict[str, int]) -> list[str]:
    """A line where the head is kept and the classes have another order or other names than ``before``."""
    if not before or before == classes or heads:
        return []
    called = f"{', '.join(before[:4])}{', ...' if len(before) > 4 else ''}"
    if is_reordered(before, classes):
        return [f"The head is kept for the same classes, its rows in the order of the data; the order was {called}."]
    return [f"The head is kept for the same number of classes, but these are others; they were called {called}."]
