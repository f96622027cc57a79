"""Differences of top-1 between models that were measured on the same images."""

from __future__ import annotations

from collections.abc import Sequence

from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.study.paired_difference import Difference, paired_difference


def differences_to_first(models: Sequence[Measurements]) -> list[Difference | None]:
    """Of each model to the first one, over the same images, paired; ``None`` where the images are not the same."""
    first = models[0].predictions
    found: list[Difference | None] = [None]
    for model in models[1:]:
        own = model.predictions
        if first is None or own is None or not own.correct or own.images != first.images or not first.correct:
            found.append(None)
        else:
            found.append(paired_difference([own.correct], [first.correct]))
    return found
