"""The decisions of a study: its arms, seeds, budget and learning-rate search."""

from __future__ import annotations

from dataclasses import dataclass

from condconv_surgery.errors import InputError
from condconv_surgery.recipe.study_arms import DEFAULT_ARMS, Arm, parse_arms

BUDGETS = ("steps", "time")
RATE_FACTOR = 3.0
"""Neighbouring learning rates of a search differ by this factor."""


@dataclass(frozen=True)
class StudyOptions:
    """arms: texts or ``Arm`` objects. seeds: scored runs of each arm. rates: learning rates tried for each arm.

    budget: ``"steps"``: equal training steps; ``"time"``: each arm has as many epochs as fit into the time that the
    slowest needs, by time per step, measured before the study.
    """

    arms: tuple[Arm, ...] = ()
    seeds: int = 3
    budget: str = "steps"
    rates: int = 3

    def __post_init__(self) -> None:
        if not self.arms:
            object.__setattr__(self, "arms", parse_arms(DEFAULT_ARMS))
        for name in ("seeds", "rates"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}.", "It must be a whole number of at least 1.", f"{name}=3")
        if self.budget not in BUDGETS:
            raise InputError(
                f"budget is {self.budget!r}.", f"It must be one of: {', '.join(BUDGETS)}.", 'budget="steps"'
            )

    @property
    def baseline(self) -> Arm:
        """The first unconverted arm."""
        return next(arm for arm in self.arms if arm.variant is None)


def rates_around(lr: float, count: int) -> list[float]:
    """``count`` learning rates a factor of 3 apart, ``lr`` in the middle; rounded to two digits.

    >>> rates_around(1e-3, 3), rates_around(1e-3, 2)
    ([0.00033, 0.001, 0.003], [0.001, 0.003])
    """
    first = -((count - 1) // 2)
    return [lr if not power else float(f"{lr * RATE_FACTOR**power:.2g}") for power in range(first, first + count)]
