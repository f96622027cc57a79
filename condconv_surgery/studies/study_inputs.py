"""What a study is given: the unconverted network, the options of its runs, the images in three parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from condconv_surgery.data.three_parts import ThreeParts, find_three_parts
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.recipe import recipe_of
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.finetuning import complete_options, model_of


@dataclass(frozen=True)
class StudyInputs:
    """original: a copy, on the CPU, in float32. training: the options of all runs."""

    original: nn.Module
    training: TrainingOptions
    parts: ThreeParts


def study_inputs(
    model: nn.Module | str | Path,
    options: TrainingOptions | Mapping[str, Any] | None,
    data: str | Path | None,
    output: str | Path | None,
) -> StudyInputs:
    """The inputs of ``compare`` or ``quick_check``, checked. Raises ``InputError`` for what cannot be compared."""
    training = complete_options(model, options, data, output)
    loaded = model_of(model, training)
    _require_unconverted(loaded)
    original = copy.deepcopy(loaded).float().cpu()
    return StudyInputs(original, training, find_three_parts(training.data, training.seed))


def _require_unconverted(model: nn.Module) -> None:
    layers = list(conditional_layers(model))
    if layers:
        recipe = recipe_of(model)
        raise InputError(
            f"The model is converted already: {layers[0]} is conditional.",
            "A comparison starts from the unconverted network and converts it itself, once for each arm.",
            (recipe and recipe.source.name) or "the model that was given to convert",
        )
