"""The interval of a difference: quantiles of a published table, a hand calculation, coverage by simulation."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from condconv_surgery.reporting.study.paired_difference import Difference, paired_difference
from condconv_surgery.reporting.study.student_t import t_cdf, t_quantile

TABLE = {  # Abramowitz and Stegun, table 26.10: A(t|df) = 0.90, 0.95, 0.99, two-sided
    1: (6.314, 12.706, 63.657),
    2: (2.920, 4.303, 9.925),
    3: (2.353, 3.182, 5.841),
    5: (2.015, 2.571, 4.032),
    10: (1.812, 2.228, 3.169),
    20: (1.725, 2.086, 2.845),
    30: (1.697, 2.042, 2.750),
    120: (1.658, 1.980, 2.617),
    10**7: (1.645, 1.960, 2.576),
}


@pytest.mark.parametrize("df", TABLE)
def test_quantiles_are_those_of_a_published_table(df: int) -> None:
    for two_sided, expected in zip((0.90, 0.95, 0.99), TABLE[df], strict=True):
        assert t_quantile((1 + two_sided) / 2, df) == pytest.approx(expected, abs=6e-4)


def test_the_distribution_with_one_and_two_degrees_of_freedom_is_known() -> None:
    for t in (-3.0, -0.5, 0.0, 0.7, 12.0):
        assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-9)
        assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-9)


def test_a_hand_calculation() -> None:
    """Two seeds, four images; differences 1 0 0 0 and 1 0 0 -1."""
    found = paired_difference(["1010", "1010"], ["0010", "0011"])
    assert found.mean == pytest.approx(1 / 8)
    of_images = statistics.variance([1, 0, 0, -0.5, 1, -1]) / 4  # and two that are never seen
    of_seeds = statistics.variance([1 / 4, 0]) / 2
    df = (of_images + of_seeds) ** 2 / (of_images**2 / 3 + of_seeds**2 / 1)
    assert found.half == pytest.approx(t_quantile(0.975, df) * math.sqrt(of_images + of_seeds))
    assert (found.seeds, found.images) == (2, 4)
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)


def test_few_images_prove_nothing_however_equal_they_are() -> None:
    assert paired_difference(["111"] * 3, ["000"] * 3).low < 0
    same = paired_difference(["1" * 500] * 3, ["1" * 500] * 3)
    assert same.mean == 0
    assert same.half > 0
    assert paired_difference(["1" * 100] * 3, ["0" * 100] * 3).low > 0.8


def test_arms_exchanged_give_the_opposite_difference() -> None:
    rng = random.Random(0)
    one, other = ([("".join(rng.choice("01") for _ in range(50))) for _ in range(3)] for _ in range(2))
    there, back = paired_difference(one, other), paired_difference(other, one)
    assert there.mean == -back.mean
    assert there.half == pytest.approx(back.half)


def simulated(rng: random.Random, seeds: int, images: int, of_seed: float, of_image: float) -> Difference:
    """Two networks of which the second is right .1 more often for an average seed and image (uniform random effects).

    Each prediction is Bernoulli with probability .5 plus, in the second network, .1 + effect of seed + of image.
    """
    seed_effects = [rng.uniform(-1, 1) * of_seed for _ in range(seeds)]
    image_effects = [rng.uniform(-1, 1) * of_image for _ in range(images)]

    def run(added: float, seed_effect: float, weight: float) -> str:
        chances = (0.5 + added + seed_effect + weight * effect for effect in image_effects)
        return "".join("1" if rng.random() < chance else "0" for chance in chances)

    first = [run(0.0, 0.0, 0.0) for _ in seed_effects]
    return paired_difference([run(0.1, effect, 1.0) for effect in seed_effects], first)


@pytest.mark.parametrize(
    ("seeds", "images", "of_seed", "of_image"),
    [(3, 200, 0.0, 0.0), (3, 200, 0.0, 0.35), (3, 200, 0.15, 0.2), (5, 150, 0.1, 0.2), (3, 30, 0.0, 0.3)],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(
    seeds: int, images: int, of_seed: float, of_image: float
) -> None:
    rng, trials = random.Random(1), 300
    found = [simulated(rng, seeds, images, of_seed, of_image) for _ in range(trials)]
    covered = sum(one.low <= 0.1 <= one.high for one in found) / trials
    assert covered > 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)


def test_an_interval_over_images_alone_would_miss_the_spread_of_seeds() -> None:
    """What the seeds are for: without their variance the same simulation covers far too rarely."""
    rng, trials = random.Random(1), 200
    found = [simulated(rng, 1, 1000, 0.15, 0.2) for _ in range(trials)]
    assert sum(one.low <= 0.1 <= one.high for one in found) / trials < 0.8
