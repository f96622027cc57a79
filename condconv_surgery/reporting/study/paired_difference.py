"""The difference of two arms with a 95% interval over seeds and images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from condconv_surgery.errors import InputError
from condconv_surgery.recipe.study_record import ArmRecord
from condconv_surgery.reporting.study.student_t import t_quantile

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """``mean`` of top-1, as a share, with ``half`` the width of its 95% interval. With one seed: over images only."""

    mean: float
    half: float
    seeds: int
    images: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the ends of the interval."""
        return {**asdict(self), "low": self.low, "high": self.high}


def difference_of(arm: ArmRecord, baseline: ArmRecord) -> Difference:
    """``arm`` minus ``baseline``, over the seeds that both have. Raises ``InputError`` when there is none."""
    pairs = [(run.correct, other.correct) for run in arm.runs if (other := baseline.run(run.seed)) is not None]
    if not pairs:
        raise InputError(
            f"{arm.name} and {baseline.name} have no seed in common.",
            "Runs are paired by seed.",
            "score both arms with the seeds 0, 1, 2",
        )
    return paired_difference([own for own, _ in pairs], [other for _, other in pairs])


def paired_difference(arm: Sequence[str], baseline: Sequence[str]) -> Difference:
    """The difference of two arms; texts of 0 and 1, one text a seed and one digit an image.

        d[s,i] = arm - baseline;   SE^2 = var_s(mean_i d) / S  +  var_i(mean_s d) / N;   mean +- t(df) SE

    Seeds and images are crossed random effects: the interval holds for other seeds and for other images of the same
    kind. Both variances contain the remaining variance of single predictions, so SE is a little too large, never too
    small. df by Welch and Satterthwaite. var_i also counts two images that are never seen, one won and one lost (Bonett
    and Price 2012): an interval from few differing images is not too narrow.
    """
    seeds, images = len(arm), len(arm[0])
    by_seed, by_image = [0] * seeds, [0] * images
    for s, (own, other) in enumerate(zip(arm, baseline, strict=True)):
        for i, (right, right_before) in enumerate(zip(own, other, strict=True)):
            if right != right_before:
                change = 1 if right == "1" else -1
                by_seed[s] += change
                by_image[i] += change
    mean = sum(by_seed) / (seeds * images)
    of_images = _variance([*(total / seeds for total in by_image), 1.0, -1.0]) / images
    of_seeds = _variance([total / images for total in by_seed]) / seeds if seeds > 1 else 0.0
    error = math.sqrt(of_seeds + of_images)
    df = (of_seeds + of_images) ** 2 / (of_seeds**2 / max(seeds - 1, 1) + of_images**2 / max(images - 1, 1))
    return Difference(mean, t_quantile((1 + CONFIDENCE) / 2, df) * error, seeds, images)


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)
