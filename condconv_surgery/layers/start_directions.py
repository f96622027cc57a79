"""Directions along which routers start: those in which pooled features vary most over images.

Equal experts may have any gates that sum to 1, so a router need not start at zero (``recipe.Upcycling``). Its logits
then vary over images from the first step, and each expert has a gradient of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Features(NamedTuple):
    """Pooled features [N, I] in float64 on the CPU, one row for each image.

    observed: of real images. Otherwise the rows are samples of a distribution that is assumed, in which no direction is
    better than another.
    """

    values: Tensor
    observed: bool


def assumed_features(
    channels: int, generator: torch.Generator, mean: float | Tensor = 0.0, std: float = 1.0
) -> Features:
    """Samples of independent normal features with this mean (a number or [channels]) and standard deviation."""
    count = 2 * channels + 64
    return Features(torch.randn(count, channels, generator=generator, dtype=torch.float64) * std + mean, observed=False)


def start_linear_(linear: nn.Linear, features: Features, spread: float, generator: torch.Generator) -> None:
    """Set ``linear`` such that each output has mean 0 and standard deviation ``spread`` over the images, in place."""
    rows = spread * directions(features, linear.out_features, generator)
    linear.weight.copy_(rows)
    linear.bias.copy_(-(rows @ features.values.mean(0)))


def start_antithetic_(linear: nn.Linear, features: Features, spread: float, generator: torch.Generator) -> None:
    """As ``start_linear_``, in pairs of outputs ``z[2k+1] = -z[2k]``, in place; an odd one is zero for every input."""
    pairs = linear.out_features // 2
    linear.weight.zero_()
    linear.bias.zero_()
    if not pairs:
        return
    rows = nn.Linear(linear.in_features, pairs, dtype=torch.float64)
    start_linear_(rows, features, spread, generator)
    for own, half in ((linear.weight, rows.weight), (linear.bias, rows.bias)):
        own[0 : 2 * pairs : 2] = half.to(own)
        own[1 : 2 * pairs : 2] = -half.to(own)


def outputs_of(linear: nn.Linear, features: Features) -> Tensor:
    """``linear`` of the features, [N, width] in float64."""
    outputs = features.values @ linear.weight.double().cpu().T
    return outputs if linear.bias is None else outputs + linear.bias.double().cpu()


def standardise_outputs_(linear: nn.Linear, features: Features) -> None:
    """Shift and scale the outputs of ``linear`` to mean 0 and standard deviation 1 over the images, in place."""
    linear.bias.zero_()
    outputs = outputs_of(linear, features)
    inverse = _inverse(outputs.std(0, correction=0))
    linear.weight.mul_(inverse[:, None].to(linear.weight))
    linear.bias.copy_(-outputs.mean(0) * inverse)


def directions(features: Features, count: int, generator: torch.Generator) -> Tensor:
    """Rows r [count, I] such that ``r @ f`` has standard deviation 1 over the images.

    The principal directions of the features, whitened by channel, as far as their rank goes; further ones, and all
    of assumed features, are random. A row is zero where nothing varies.
    """
    centred = features.values - features.values.mean(0)
    whiten = _inverse(centred.std(0, correction=0))
    white = centred * whiten  # [N, I]
    rows = torch.randn(count, white.shape[1], generator=generator, dtype=torch.float64)
    if features.observed:
        principal = _principal(white, count)
        rows[: len(principal)] = principal
    return rows * whiten * _inverse((white @ rows.T).std(0, correction=0))[:, None]


def _principal(white: Tensor, count: int) -> Tensor:
    """Up to ``count`` right singular vectors of ``white`` [N, D], by the eigenvectors of its smaller Gram matrix."""
    tall = white.shape[0] > white.shape[1]
    values, vectors = torch.linalg.eigh(white.T @ white if tall else white @ white.T)
    used = min(count, int((values > 1e-4 * values[-1]).sum()))
    vectors = vectors[:, len(values) - used :].flip(1)  # [., used], of the largest first
    rows: Tensor = vectors.T if tall else vectors.T @ white
    return rows


def _inverse(std: Tensor) -> Tensor:
    """``1 / std``, and 0 below 1% of the mean: a channel that hardly varies is ignored, not amplified."""
    varies = std > 0.01 * std.mean()
    return torch.where(varies, 1.0 / torch.where(varies, std, 1.0), 0.0)
