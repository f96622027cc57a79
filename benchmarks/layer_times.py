"""Time of each layer geometry: ours against the static convolution and against other implementations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.contenders import Layer, contenders
from benchmarks.model_geometries import Site
from benchmarks.setting import USUAL, Setting
from benchmarks.timing import interleaved, milliseconds, ratio
from condconv_surgery.layers import conditional_like
from condconv_surgery.recipe import CondConv, ODConv, Variant

VARIANTS: dict[str, Variant] = {
    "condconv4": CondConv(experts=4),
    "odconv4": ODConv(experts=4),
    "odconv1": ODConv(experts=1),
}
R = TypeVar("R")
TOLERANCE = 1e-3  # float32, relative to the largest value


@dataclass(frozen=True)
class LayerResult:
    """Times of one geometry, variant and mode.

    milliseconds: the median of each contender. against_static: ours / static. speedup: the best other / ours.
    """

    site: str
    count: int
    variant: str
    mode: str
    milliseconds: dict[str, float]
    against_static: float
    best_other: str
    speedup: float

    def as_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def measure_layers(
    sites: Iterable[Site],
    variants: dict[str, Variant],
    batch: int,
    repeats: int,
    seconds: float,
    setting: Setting = USUAL,
) -> list[LayerResult]:
    """Check the output of each contender against ours, then time all of them, in eval and in training."""
    measure = partial(_measure, batch=batch, repeats=repeats, seconds=seconds, setting=setting)
    return measure_each(sites, variants, measure, _line)


def measure_each(
    sites: Iterable[Site],
    variants: dict[str, Variant],
    measure: Callable[[Site, str, Variant, str], R],
    line: Callable[[R], str],
) -> list[R]:
    """``measure(site, name, variant, mode)`` for every layer, in eval and in training; one line each on stderr."""
    results = []
    for site in sites:
        for name, variant in variants.items():
            for mode in ("eval", "train"):
                result = measure(site, name, variant, mode)
                print(line(result), file=sys.stderr, flush=True)
                results.append(result)
    return results


def check_layer(site: Site, variant: Variant, batch: int, setting: Setting = USUAL) -> dict[str, float]:
    """Largest relative difference of each contender from ours, in the output and in the gradient of the input.

    Always in float32, also where the setting says autocast.
    """
    layer, x = routed_layer(site, variant, setting), random_input(site, batch, setting)
    differences, expected = {}, None
    for name, run in contenders(layer).items():
        y = run(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        if expected is None:
            expected = (y.detach(), grad)
        pairs = zip((y, grad), expected, strict=True)
        differences[name] = max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)
    return differences


def _measure(
    site: Site, name: str, variant: Variant, mode: str, batch: int, repeats: int, seconds: float, setting: Setting
) -> LayerResult:
    if mode == "eval":
        differences = check_layer(site, variant, min(batch, 4), setting)
        wrong = {who: value for who, value in differences.items() if not value <= TOLERANCE}
        if wrong:
            raise AssertionError(f"{site} {name}: not the same function: {wrong}")
    layer, x = routed_layer(site, variant, setting), random_input(site, batch, setting)
    runs: dict[str, Callable[[Tensor], Tensor]] = {"static": setting.place(site.conv()), **contenders(layer)}
    make = evaluation if mode == "eval" else training
    times = interleaved({who: make(run, x, setting) for who, run in runs.items()}, repeats, seconds)
    ratios = {who: ratio(times, who, "ours") for who in runs if who not in ("static", "ours")}
    best = min(ratios, key=lambda who: ratios[who])
    return LayerResult(
        str(site),
        site.count,
        name,
        mode,
        milliseconds(times),
        ratio(times, "ours", "static"),
        best,
        ratios[best],
    )


def routed_layer(site: Site, variant: Variant, setting: Setting = USUAL) -> Layer:
    """A conditional layer whose router gives each sample a different mixture."""
    torch.manual_seed(0)
    layer = conditional_like(site.conv(), variant)
    for parameter in layer.router.parameters():
        nn.init.normal_(parameter, std=0.1)
    return setting.place(layer.eval())


def random_input(site: Site, batch: int, setting: Setting = USUAL) -> Tensor:
    """[B, I, H, W], equal at every call."""
    torch.manual_seed(1)
    return setting.place(torch.randn(batch, site.geometry.in_channels, *site.size)).requires_grad_()


def evaluation(run: Callable[[Tensor], Tensor], x: Tensor, setting: Setting = USUAL) -> Callable[[], object]:
    """A forward pass of ``run`` under ``no_grad``."""

    def step() -> None:
        with torch.no_grad(), setting.precision():
            run(x)

    return step


def training(run: Callable[[Tensor], Tensor], x: Tensor, setting: Setting = USUAL) -> Callable[[], object]:
    """Forward and backward pass of ``run``: gradients of ``x`` and of all parameters."""
    with torch.no_grad(), setting.precision():
        direction = torch.randn_like(run(x))
    leaves = [x, *(p for p in run.parameters())] if isinstance(run, nn.Module) else [x]

    def step() -> None:
        with setting.precision():
            y = run(x)
        torch.autograd.grad(y, leaves, direction, allow_unused=True)

    return step


def _line(result: LayerResult) -> str:
    return (
        f"{result.site:36} {result.variant:10} {result.mode:5}  {result.against_static:5.2f} x static"
        f"  {result.speedup:6.2f} x faster than {result.best_other}"
    )
