"""An exponential moving average of weights and buffers, whose decay is warmed up so that short runs converge.

    decay(t) = min(ema, 1 - (1 + t)^(-2/3))        t updates so far; as timm's ModelEmaV3 with its warm-up

Without the warm-up a decay of .9999 needs tens of thousands of steps to forget the initial weights.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from condconv_surgery.recipe.training_sections import EngineOptions

POWER = 2 / 3

LARGEST_SHARE = 0.01
"""Share of the initial weights in the final average from which on a run is warned."""


class WeightAverage(AveragedModel):
    """Torch's average of a model, with the decay of the step.

    whole: all tensors in one call, which torch cannot do where sharded weights and plain buffers are mixed.
    """

    def __init__(self, model: nn.Module, limit: float, *, whole: bool = True) -> None:
        self.limit, self.now = limit, 0.0
        one, many = (None, self._average_all) if whole else (self._average_one, None)
        super().__init__(model, avg_fn=one, multi_avg_fn=many, use_buffers=True)

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step number ``step`` (from 0)."""
        self.now = decay_at(step, self.limit)
        self.update_parameters(model)

    def _average_all(self, averaged: Any, current: Any, count: Any) -> None:
        get_ema_multi_avg_fn(self.now)(averaged, current, count)  # type: ignore[no-untyped-call]

    def _average_one(self, averaged: Tensor, current: Tensor, count: Any) -> Tensor:
        mean: Tensor = get_ema_avg_fn(self.now)(averaged, current, count)  # type: ignore[no-untyped-call]
        return mean


def decay_at(step: int, limit: float) -> float:
    """The decay of an update after ``step`` earlier ones.

    >>> [round(decay_at(step, 0.999), 3) for step in (0, 10, 1000, 10**6)]
    [0.0, 0.798, 0.99, 0.999]
    """
    return float(min(limit, 1 - (1 + step) ** -POWER))


def averaged(model: nn.Module, engine: EngineOptions) -> WeightAverage | None:
    """The average that the options ask for; ``None`` for decay 0."""
    return WeightAverage(model, engine.ema, whole=not engine.shard) if engine.ema else None


def average_note(limit: float, steps: int) -> list[str]:
    """A line where a run of ``steps`` is too short: early weights stay in the average, or the decay stays below."""
    if not limit or not steps:
        return []
    decays = [decay_at(step, limit) for step in range(steps)]
    early = math.prod(decays[1:])  # share of the weights after the first step
    if early > LARGEST_SHARE:
        return [
            f"engine.ema={limit:g}: after {steps} steps {early:.0%} of the average are the weights of the first step; "
            "it cannot have converged. More epochs, or engine.ema=0."
        ]
    if decays[-1] < limit:
        return [
            f"engine.ema={limit:g} is not reached: the decay is warmed up, to {decays[-1]:.4g} after {steps} steps."
        ]
    return []
