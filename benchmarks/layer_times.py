"""Time of each layer geometry: ours against the static convolution and against other implementations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.contenders import TORCH_WAYS, Layer, contenders
from benchmarks.geometries.model_geometries import Site
from benchmarks.protocol import Measurement, Protocol, Spread
from benchmarks.setting import USUAL, Setting
from benchmarks.timing import interleaved
from condconv_surgery import native
from condconv_surgery.layers import conditional_like
from condconv_surgery.recipe import CondConv, ODConv, Variant

VARIANTS: dict[str, Variant] = {
    "condconv4": CondConv(experts=4),
    "odconv4": ODConv(experts=4),
    "odconv1": ODConv(experts=1),
}
R = TypeVar("R")
TOLERANCE = 1e-3  # float32, relative to the largest value
SLOW = 2.0
"""Times ours, at first sight: such a way is not measured."""


@dataclass(frozen=True)
class LayerResult:
    """Times of one geometry, variant and mode; the ratios of ``times`` are to ours."""

    site: str
    count: int
    variant: str
    mode: str
    times: Measurement

    @property
    def against_static(self) -> Spread:
        """Ours / static."""
        return self.times.ratios["static"].inverse

    @property
    def best_other(self) -> str:
        """The fastest of the others."""
        return min(self._others, key=lambda who: self._others[who].median)

    @property
    def speedup(self) -> Spread:
        """The best other / ours."""
        return self._others[self.best_other]

    @property
    def _others(self) -> dict[str, Spread]:
        return {who: value for who, value in self.times.ratios.items() if who not in ("ours", "static")}

    @property
    def key(self) -> tuple[str, str, str]:
        """What was measured."""
        return self.site, self.variant, self.mode

    def as_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**asdict(self), "best_other": self.best_other, "speedup": self.speedup.median}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LayerResult:
        """The inverse of ``as_json``."""
        times = Measurement.from_json(values["times"])
        return cls(values["site"], values["count"], values["variant"], values["mode"], times)


@dataclass(frozen=True)
class LayerRun:
    """How layers are measured. seconds: for which a contender runs in a turn. torch_ways: as in ``contenders``."""

    protocol: Protocol
    batch: int
    seconds: float
    setting: Setting = USUAL
    torch_ways: bool = False


def measure_layers(
    sites: Iterable[Site], variants: dict[str, Variant], run: LayerRun, known: Iterable[LayerResult] = ()
) -> Iterator[LayerResult]:
    """Check the output of each contender against ours, then time all of them, in eval and in training.

    known: results that are returned instead of being measured again.
    """
    by_key = {result.key: result for result in known}

    def measure(site: Site, name: str, variant: Variant, mode: str) -> LayerResult:
        return by_key.get((str(site), name, mode)) or _measure(site, name, variant, mode, run)

    return measure_each(sites, variants, measure, _line)


def measure_each(
    sites: Iterable[Site],
    variants: dict[str, Variant],
    measure: Callable[[Site, str, Variant, str], R],
    line: Callable[[R], str],
) -> Iterator[R]:
    """``measure(site, name, variant, mode)`` for every layer, in eval and in training; one line each on stderr."""
    for site in sites:
        for name, variant in variants.items():
            for mode in ("eval", "train"):
                result = measure(site, name, variant, mode)
                print(line(result), file=sys.stderr, flush=True)
                yield result


def check_layer(
    site: Site, variant: Variant, batch: int, setting: Setting = USUAL, torch_ways: bool = False
) -> dict[str, float]:
    """Largest relative difference of each contender from ours, in the output and in the gradient of the input.

    Always in float32, also where the setting says autocast.
    """
    layer, x = routed_layer(site, variant, setting), random_input(site, batch, setting)
    differences, expected = {}, None
    for name, run in contenders(layer, torch_ways).items():
        y = run(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        if expected is None:
            expected = (y.detach(), grad)
        pairs = zip((y, grad), expected, strict=True)
        differences[name] = max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)
    return differences


def _measure(site: Site, name: str, variant: Variant, mode: str, run: LayerRun) -> LayerResult:
    setting = run.setting
    if mode == "eval":
        differences = check_layer(site, variant, min(run.batch, 4), setting, run.torch_ways)
        wrong = {who: value for who, value in differences.items() if not value <= TOLERANCE}
        if wrong:
            raise AssertionError(f"{site} {name}: not the same function: {wrong}")
    layer, x = routed_layer(site, variant, setting), random_input(site, run.batch, setting)
    ours, *others = contenders(layer, run.torch_ways).items()
    make = evaluation if mode == "eval" else training
    steps = {who: make(call, x, setting) for who, call in (ours, ("static", setting.place(site.conv())), *others)}
    if run.torch_ways:
        if native.is_enabled():
            steps["operators"] = _without_kernels(steps["ours"])
        steps = _without_slow_ways(steps)
    return LayerResult(str(site), site.count, name, mode, run.protocol.measure(steps, run.seconds))


def _without_kernels(step: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        with native.kernels(False):
            step()

    return run


def _without_slow_ways(steps: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Those that come near ours at first sight: some take a hundred times as long, and need as much memory."""
    times = {name: min(taken) for name, taken in interleaved(steps, 2).items()}
    return {name: run for name, run in steps.items() if name not in TORCH_WAYS or times[name] < SLOW * times["ours"]}


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
        f"{result.site:36} {result.variant:10} {result.mode:5}  {result.against_static} x static"
        f"  {result.speedup} x faster than {result.best_other}"
    )
