"""The choice of a way: against measured times, and without binding a compiled or exported program."""

from __future__ import annotations

import json
import math
import operator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("timm")  # as the benchmarks do

from benchmarks.geometries.model_geometries import sites
from benchmarks.layer_times import VARIANTS
from condconv_surgery.layers import CondConv2d, ODConv2d, conditional_like
from condconv_surgery.ops import choose_implementation as choice
from condconv_surgery.ops.choose_implementation import candidates, choose, estimate
from condconv_surgery.ops.cost_model import CPU, GPU_HALF, NOMINAL_BATCH
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.recipe import CondConv, ODConv, Variant

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


SITES = {str(site): site for site in sites()}
SETTINGS = {"": torch.float32, "bfloat16-": torch.bfloat16, "last-": torch.float32}  # last: channels_last


@cache
def measured(mode: str, setting: str) -> list[tuple[dict[str, float], dict[str, float], dict[str, float]]]:
    """Rows of ``python -m benchmarks implementations``: milliseconds, estimates of all, and of those to choose from.

    The estimates are made anew: what the code would choose now is judged, not what it chose then.
    """
    found = []
    for row in json.loads((RESULTS / f"{setting}implementations.json").read_text())["results"]:
        if row["mode"] != mode:
            continue
        variant, g = VARIANTS[row["variant"]], SITES[row["site"]].geometry
        with torch.device("meta"):
            layer = conditional_like(SITES[row["site"]].conv(), variant)
        x = torch.empty(32, g.in_channels, *SITES[row["site"]].size, dtype=SETTINGS[setting], device="meta")
        mixture = layer.route(x.float())
        estimates = {way: estimate(way, x, variant.experts, mixture, g) for way in row["milliseconds"] if way != "loop"}
        for_use = (candidates(mixture, g, use) for use in ("cpu", "export"))
        chosen_from = ({way: estimate(way, x, variant.experts, mixture, g) for way in ways} for ways in for_use)
        found.append((row["milliseconds"], estimates, *chosen_from))
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("use", ["called", "exported"])
def test_the_choice_is_close_to_the_fastest_measured_way(mode: str, use: str, setting: str) -> None:
    regrets = []
    for times, _, to_call, to_export in measured(mode, setting):
        choice_of = to_export if use == "exported" else to_call
        allowed = [way for way in times if use == "called" or way not in (("blockwise", "loop"))]
        regrets.append(times[min(choice_of, key=choice_of.__getitem__)] / min(times[way] for way in allowed))
    assert len(regrets) >= 20
    assert math.exp(sum(map(math.log, regrets)) / len(regrets)) <= 1.1


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_estimates_order_the_ways_as_measured(setting: str) -> None:
    """Of all pairs of ways that differ by half or more, nine in ten come in the measured order."""
    right = []
    for times, estimates, *_ in measured("eval", setting):
        pairs = [(a, b) for a in estimates for b in estimates if times[a] > 1.5 * times[b]]
        right += [estimates[a] > estimates[b] for a, b in pairs]
    assert len(right) >= 50
    assert sum(right) / len(right) >= 0.9


def test_an_estimate_is_work_over_rates() -> None:
    geometry = ConvGeometry.make(64, 64, 3, padding=1)
    x, mixture = torch.empty(2, 64, 28, 28, device="meta"), Mixture(gate=torch.empty(2, 4, device="meta"))
    macs, kernel = 64 * 64 * 9 * 28 * 28, 64 * 64 * 9 * 4
    assert kernel * NOMINAL_BATCH < CPU.fresh_from
    assert estimate("static", x, 1, Mixture(), geometry) == pytest.approx(macs / CPU.dense)
    expected = macs / CPU.dense + 2 * kernel / CPU.warm
    assert estimate("blockwise", x, 4, mixture, geometry) == pytest.approx(expected)
    half = estimate("blockwise", x.half(), 4, mixture, geometry) - macs / CPU.dense
    assert half == pytest.approx(kernel / CPU.warm)


@pytest.mark.parametrize(
    ("conv", "side", "variant", "expected"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), 56, CondConv(experts=4), "blockwise"),
        (nn.Conv2d(512, 512, 3, padding=1), 7, CondConv(experts=4), "mix-outputs"),
        (nn.Conv2d(512, 512, 3, padding=1), 7, ODConv(experts=4), "blockwise"),  # nothing else mixes positions
        (nn.Conv2d(512, 2048, 1), 7, CondConv(experts=4), "mix-inputs"),
        (nn.Conv2d(2048, 512, 1), 7, CondConv(experts=4), "mix-outputs"),
        (nn.Conv2d(512, 128, 1), 28, CondConv(experts=4), "blockwise"),
        (nn.Conv2d(64, 256, 1), 56, ODConv(experts=1), "blockwise"),  # scales in the kernel
        (nn.Conv2d(512, 2048, 1), 7, ODConv(experts=1), "static"),
        (nn.Conv2d(192, 192, 3, padding=1, groups=192), 28, CondConv(experts=4), "blockwise"),
    ],
    ids=str,
)
def test_the_choice_on_a_gpu_is_the_fastest_measured_there(
    conv: nn.Conv2d, side: int, variant: Variant, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H100 in bfloat16, batch 32 (benchmarks/NOTES.md)."""
    monkeypatch.setattr(choice, "rates_of", lambda x: GPU_HALF)
    monkeypatch.setattr(choice, "counts_as_cpu", lambda x: False)
    monkeypatch.setattr(choice, "_choices", {})
    layer = conditional_like(conv.to("meta"), variant)
    x = torch.empty(32, conv.in_channels, side, side, dtype=torch.bfloat16, device="meta")
    mixture = layer.route(x.float())
    assert [choose(x, layer.weight, mixture, layer.geometry) for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize("side", [7, 14, 56])
def test_the_least_estimate_is_taken(side: int) -> None:
    layer = conditional_like(nn.Conv2d(64, 64, 1), ODConv(experts=1)).eval()
    x = torch.randn(2, 64, side, side)
    mixture = layer.route(x)
    ways = candidates(mixture, layer.geometry, "cpu")
    assert sorted(ways) == ["blockwise", "static"]
    costs = {way: estimate(way, x, 1, mixture, layer.geometry) for way in ways}
    assert choose(x, layer.weight, mixture, layer.geometry) == min(costs.items(), key=operator.itemgetter(1))[0]


def test_what_a_program_can_hold() -> None:
    """Groups are a constant of ONNX and of a traced program, so they cannot be the batch."""
    geometry, mixture = ConvGeometry.make(16, 32, 3), Mixture(gate=torch.empty(2, 4, device="meta"))
    of_use = {use: candidates(mixture, geometry, use) for use in ("cpu", "export", "any batch")}
    assert of_use == {
        "cpu": ["blockwise"],
        "export": ["grouped", "unfold", "mix-outputs", "mix-inputs"],
        "any batch": ["unfold", "mix-outputs", "mix-inputs"],
    }


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
