"""Time of each implementation of a layer beside its estimate (``ops.cost_model``): how good is the choice?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from benchmarks.geometries.model_geometries import Site
from benchmarks.layer_times import evaluation, measure_each, random_input, routed_layer, training
from benchmarks.setting import USUAL, Setting
from benchmarks.timing import interleaved, milliseconds
from condconv_surgery.ops.autocast import autocast
from condconv_surgery.ops.choose_implementation import candidates, choose, estimate
from condconv_surgery.ops.implementations import legal_implementations
from condconv_surgery.recipe import Variant


@dataclass(frozen=True)
class ImplementationTimes:
    """One geometry, variant and mode. By implementation: measured and estimated milliseconds of the whole batch.

    Estimates are of a forward pass. chosen: what ``choose`` returns. exported: its choice under ``torch.export``.
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
        """Time of the chosen implementation / time of the fastest."""
        return self.milliseconds[self.chosen] / min(self.milliseconds.values())

    def as_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def measure_implementations(
    sites: Iterable[Site],
    variants: dict[str, Variant],
    batch: int,
    repeats: int,
    seconds: float,
    setting: Setting = USUAL,
) -> list[ImplementationTimes]:
    """Every legal implementation of every layer, in eval and in training."""
    measure = partial(_measure, batch=batch, repeats=repeats, seconds=seconds, setting=setting)
    return list(measure_each(sites, variants, measure, implementations_line))


def implementations_line(result: ImplementationTimes) -> str:
    """Measured / estimated milliseconds of each implementation, the chosen one marked."""
    cells = [
        f"{name}{'*' if name == result.chosen else ''} {value:.1f}/{result.estimated[name]:.1f}"
        for name, value in result.milliseconds.items()
    ]
    return f"{result.site:36} {result.variant:10} {result.mode:5} {result.regret:5.2f}  " + "  ".join(cells)


def _measure(
    site: Site, name: str, variant: Variant, mode: str, batch: int, repeats: int, seconds: float, setting: Setting
) -> ImplementationTimes:
    x = random_input(site, batch, setting)
    make = evaluation if mode == "eval" else training
    layer = routed_layer(site, variant, setting)
    with torch.no_grad():
        mixture = layer.route(x)
    names = legal_implementations(batch, mixture, layer.geometry)
    with setting.precision():
        cast = autocast(x)
    layers = {each: routed_layer(site, variant, setting) for each in names}
    for each, forced in layers.items():
        forced.implementation = each
    times = interleaved({each: make(forced, x, setting) for each, forced in layers.items()}, repeats, seconds)

    def estimated(implementation: str) -> float:
        return 1e3 * batch * estimate(implementation, cast, layer.experts, mixture, layer.geometry)

    return ImplementationTimes(
        str(site),
        name,
        mode,
        milliseconds(times),
        {each: estimated(each) for each in names},
        choose(cast, layer.weight, mixture, layer.geometry),
        min(candidates(mixture, layer.geometry, "export"), key=estimated),
    )
