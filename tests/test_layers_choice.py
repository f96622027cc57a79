"""The choice of a way: against measured times, and without binding a compiled or exported program."""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path

import pytest
import torch
from torch import nn

from condconv_surgery.layers import CondConv2d, ODConv2d, conditional_like
from condconv_surgery.layers.choice import candidates, choose
from condconv_surgery.layers.cost import FRESH_BYTES, MACS_A_SECOND, NOMINAL_BATCH, WARM_BYTES_A_SECOND, estimate
from condconv_surgery.layers.mixture import ConvGeometry, Mixture
from condconv_surgery.recipe import CondConv, ODConv, Variant

MEASURED = Path(__file__).parent.parent / "benchmarks" / "results" / "ways.json"


def measured(mode: str) -> list[dict[str, dict[str, float] | str]]:
    """Rows of ``python -m benchmarks ways``: milliseconds and estimates by way."""
    rows = json.loads(MEASURED.read_text())["results"]
    return [row for row in rows if row["mode"] == mode]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("use", ["chosen", "exported"])
def test_the_choice_is_close_to_the_fastest_measured_way(mode: str, use: str) -> None:
    regrets = []
    for row in measured(mode):
        times = dict(row["milliseconds"])
        if use == "exported":
            times = {way: value for way, value in times.items() if way not in ("blocks", "loop")}
        regrets.append(times[row[use]] / min(times.values()))
    assert len(regrets) >= 20
    assert math.exp(sum(map(math.log, regrets)) / len(regrets)) <= 1.1


def test_the_estimates_order_the_ways_as_measured() -> None:
    """Of all pairs of ways that differ by half or more, nine in ten come in the measured order."""
    right = []
    for row in measured("eval"):
        times, estimates = row["milliseconds"], row["estimated"]
        pairs = [(a, b) for a in times for b in times if times[a] > 1.5 * times[b]]
        right += [estimates[a] > estimates[b] for a, b in pairs]
    assert len(right) >= 50
    assert sum(right) / len(right) >= 0.9


def test_an_estimate_is_work_over_rates() -> None:
    geometry = ConvGeometry.make(64, 64, 3, padding=1)
    x, mixture = torch.empty(2, 64, 28, 28, device="meta"), Mixture(gate=torch.empty(2, 4, device="meta"))
    macs, kernel = 64 * 64 * 9 * 28 * 28, 64 * 64 * 9 * 4
    assert kernel * NOMINAL_BATCH < FRESH_BYTES
    assert estimate("static", x, 1, Mixture(), geometry) == pytest.approx(macs / MACS_A_SECOND)
    expected = macs / MACS_A_SECOND + 2 * kernel / WARM_BYTES_A_SECOND
    assert estimate("blocks", x, 4, mixture, geometry) == pytest.approx(expected)
    half = estimate("blocks", x.half(), 4, mixture, geometry) - macs / MACS_A_SECOND
    assert half == pytest.approx(kernel / WARM_BYTES_A_SECOND)


@pytest.mark.parametrize("side", [7, 14, 56])
def test_the_least_estimate_is_taken(side: int) -> None:
    layer = conditional_like(nn.Conv2d(64, 64, 1), ODConv(experts=1)).eval()
    x = torch.randn(2, 64, side, side)
    mixture = layer.route(x)
    ways = candidates(mixture, layer.geometry, exporting=False)
    assert sorted(ways) == ["blocks", "static"]
    costs = {way: estimate(way, x, 1, mixture, layer.geometry) for way in ways}
    assert choose(x, layer.weight, mixture, layer.geometry) == min(costs.items(), key=operator.itemgetter(1))[0]


@pytest.mark.parametrize("variant", [CondConv(experts=4), ODConv(experts=4), ODConv(experts=1)], ids=str)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 32, 3, padding=1),
        nn.Conv2d(16, 32, 1),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
    ],
    ids=["3x3", "1x1", "3x3 large", "depthwise"],
)
def test_an_exported_layer_takes_any_batch_and_size(conv: nn.Conv2d, variant: Variant) -> None:
    layer: CondConv2d | ODConv2d = conditional_like(conv, variant).eval()  # type: ignore[assignment]
    sizes = {dim: torch.export.Dim(name, min=2, max=64) for dim, name in ((0, "b"), (2, "h"), (3, "w"))}
    program = torch.export.export(layer, (torch.randn(3, conv.in_channels, 14, 14),), dynamic_shapes=(sizes,))
    for shape in ((5, 9, 11), (2, 40, 24)):
        x = torch.randn(shape[0], conv.in_channels, *shape[1:])
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)
