"""Each way to compute a layer, timed beside its estimate (``ops.cost_model``): what the choice of a way is worth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.layer_times import evaluation, measure_each, random_input, routed_layer, training
from benchmarks.model_geometries import Site
from benchmarks.setting import USUAL, Setting
from benchmarks.timing import interleaved, milliseconds
from condconv_surgery.ops.autocast import autocast
from condconv_surgery.ops.cost_model import estimate
from condconv_surgery.ops.dispatch import candidates, choose
from condconv_surgery.ops.implementations import legal_ways
from condconv_surgery.recipe import Variant


@dataclass(frozen=True)
class WaysResult:
    """One geometry, variant and mode. By way: measured, and the estimate of a forward pass, both of the whole batch.

    chosen: what ``choose`` takes. exported: what it takes in a program that is to be exported.
    """

    site: str
    variant: str
    mode: str
    milliseconds: dict[str, float]
    estimated: dict[str, float]
    chosen: str
    exported: str

    @property
    def regret(self) -> float:
        """The time of the chosen way over that of the fastest."""
        return self.milliseconds[self.chosen] / min(self.milliseconds.values())

    def as_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def measure_ways(
    sites: Iterable[Site],
    variants: dict[str, Variant],
    batch: int,
    repeats: int,
    seconds: float,
    setting: Setting = USUAL,
) -> list[WaysResult]:
    """Every legal way of every layer, in eval and in training."""
    measure = partial(_measure, batch=batch, repeats=repeats, seconds=seconds, setting=setting)
    return measure_each(sites, variants, measure, ways_line)


def ways_line(result: WaysResult) -> str:
    """Measured / estimated milliseconds of each way, the chosen one marked."""
    cells = [
        f"{way}{'*' if way == result.chosen else ''} {value:.1f}/{result.estimated[way]:.1f}"
        for way, value in result.milliseconds.items()
    ]
    return f"{result.site:36} {result.variant:10} {result.mode:5} {result.regret:5.2f}  " + "  ".join(cells)


def _measure(
    site: Site, name: str, variant: Variant, mode: str, batch: int, repeats: int, seconds: float, setting: Setting
) -> WaysResult:
    x = random_input(site, batch, setting)
    make = evaluation if mode == "eval" else training
    layer = routed_layer(site, variant, setting)
    with torch.no_grad():
        mixture = layer.route(x)
    ways = legal_ways(batch, mixture, layer.geometry)
    with setting.precision():
        seen = autocast(x)
    layers = {way: routed_layer(site, variant, setting) for way in ways}
    for way, forced in layers.items():
        forced.execution = way
    times = interleaved({way: make(forced, x, setting) for way, forced in layers.items()}, repeats, seconds)

    def estimated(way: str) -> float:
        return 1e3 * batch * estimate(way, seen, layer.experts, mixture, layer.geometry)

    return WaysResult(
        str(site),
        name,
        mode,
        milliseconds(times),
        {way: estimated(way) for way in ways},
        choose(seen, layer.weight, mixture, layer.geometry),
        min(candidates(mixture, layer.geometry, exporting=True), key=estimated),
    )
