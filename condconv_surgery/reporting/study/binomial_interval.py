"""The 95% interval of a share, such as top-1, from the number of images."""

from __future__ import annotations

import math

Z = 1.959964
"""97.5% quantile of the normal distribution."""


def binomial_interval(right: int, images: int) -> tuple[float, float]:
    """Low and high end of the share ``right / images`` (Wilson 1927), which holds for few images and at 0 and 1 too.

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    >>> [round(end, 3) for end in binomial_interval(9, 10)]
    [0.596, 0.982]
    """
    share, scale = right / images, Z * Z / images
    half = Z * math.sqrt(share * (1 - share) / images + scale / (4 * images))
    low, high = (share + scale / 2 - half) / (1 + scale), (share + scale / 2 + half) / (1 + scale)
    return max(0.0, low), min(1.0, high)
