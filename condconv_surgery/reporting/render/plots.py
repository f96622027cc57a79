"""The plots of a report: MACs per layer, mean gates, accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from condconv_surgery.errors import InputError
from condconv_surgery.reporting.measure.cost_table import Profile
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.measure.routing_statistics import LayerRouting, Routing
from condconv_surgery.reporting.render.matplotlib_figures import heat_map, make_figure, remove_frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {"convolution": "#8aa0b8", "mixing": "#e07b39", "routing": "#2a7f62", "attention": "#8e5bb5"}
"""Colours that differ in greyscale print and for colour-blind readers. The HTML page uses the same."""

MAX_CLASSES = 100
"""Limit of rows of a heat map: one of 1000 classes is 35,000 pixels high."""

SERIES = ("#5b6570", "#e07b39", "#2a7f62", "#8e5bb5", "#0b5cad", "#b3261e")

COSTS = {
    "millions of MACs per image": lambda model: model.profile.macs.total / 1e6,
    "millions of parameters": lambda model: model.profile.parameters / 1e6,
}
"""The x axes of accuracy against cost."""


def layer_costs(profile: Profile, title: str = "") -> Figure:
    """MACs of each layer, stacked by part: convolution, mixing, routing, attention."""
    layers = [layer for layer in profile.layers if layer.macs.total]
    figure = make_figure(8, 0.22 * len(layers) + 1.6)
    axes = figure.subplots()
    left = [0.0] * len(layers)
    for part, colour in PARTS.items():
        widths = [getattr(layer.macs, part) / 1e6 for layer in layers]
        if any(widths):
            axes.barh(range(len(layers)), widths, left=left, color=colour, label=part, height=0.8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=8.5)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlabel("millions of MACs per image")
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False)  # no space between bars
    remove_frame(axes)
    return figure


def mean_gates(routing: Routing) -> Figure:
    """Mean gate of each expert per layer, and the effective number of experts."""
    layers = routing.layers
    widest = max(layer.experts for layer in layers)
    gates = [[*layer.mean, *[float("nan")] * (widest - layer.experts)] for layer in layers]
    names = [f"{layer.name}  ({layer.used:.1f} of {layer.experts})" for layer in layers]
    high = max(2 / widest, *(max(layer.mean) for layer in layers))  # an equal share has the middle colour
    return heat_map(gates, names, "mean gates over all images", 0.0, high)


def gates_by_class(layer: LayerRouting, classes: Sequence[str]) -> Figure:
    """Mean gates of one layer per class. The colours span the smallest to the largest value of this layer.

    Of more than ``MAX_CLASSES`` classes, those that differ most are drawn.
    """
    low, high = min(map(min, layer.by_class)), max(map(max, layer.by_class))
    drawn = layer.distinct_classes(MAX_CLASSES)
    every = len(drawn) == len(classes)
    which = "by class" if every else f"of the {len(drawn)} of {len(classes)} classes that differ most"
    gates, names = [layer.by_class[c] for c in drawn], [classes[c] for c in drawn]
    return heat_map(gates, names, f"{layer.name}: mean gates {which}", low, high)


def accuracy_against_cost(models: Sequence[Measurements], costs: Sequence[str] = tuple(COSTS)) -> Figure:
    """Accuracy against cost, like CondConv's figure: one line per variant and number of experts.

    A model without a known accuracy is left out. Raises ``InputError`` when no accuracy is known.
    """
    known = [model for model in models if model.accuracy is not None]
    if not known:
        raise InputError(
            "No accuracy of these models is known.",
            "It is read from metrics.jsonl beside best.safetensors, or measured on images.",
            'data="FOLDER"',
        )
    labels = unique_short_names([model.title for model in known])
    figure = make_figure(4.6 * len(costs), 3.8)
    for position, cost in enumerate(costs):
        axes = figure.add_subplot(1, len(costs), position + 1)
        for (name, members), colour in zip(_series(known).items(), SERIES * len(known), strict=False):
            points = sorted((COSTS[cost](m), 100 * (m.accuracy or 0.0), labels[m.title]) for m in members)
            axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=colour, label=name, markersize=6)
            for x, y, text in points:
                axes.annotate(text, (x, y), xytext=(0, 7), textcoords="offset points", fontsize=10.5, ha="center")
        axes.tick_params(labelsize=10.5)
        axes.locator_params(axis="x", nbins=4)  # more ticks overlap when the numbers are long
        axes.set_xlabel(cost, fontsize=10.5)
        axes.set_ylabel("top-1, %", fontsize=10.5)
        axes.margins(0.25)
        axes.legend(frameon=False, fontsize=10.5)
        remove_frame(axes)
    return figure


def short_name(title: str) -> str:
    """A short label of a model: the folder of a run, else the file name.

    >>> short_name("runs/a/best.safetensors"), short_name("models/b.safetensors"), short_name("torchvision:resnet18")
    ('a', 'b', 'torchvision:resnet18')
    """
    path = PurePath(title)
    if path.suffix != ".safetensors":
        return title
    return path.parent.name if path.stem in ("best", "last") and path.parent.name else path.stem


def unique_short_names(titles: Sequence[str]) -> dict[str, str]:
    """``short_name`` of each title; where two are equal, the file name is added.

    >>> unique_short_names(["a/best.safetensors", "a/last.safetensors", "b/best.safetensors"])
    {'a/best.safetensors': 'a/best', 'a/last.safetensors': 'a/last', 'b/best.safetensors': 'b'}
    """
    short = {title: short_name(title) for title in titles}
    names = list(short.values())
    return {t: name if names.count(name) == 1 else f"{name}/{PurePath(t).stem}" for t, name in short.items()}


def _series(models: Sequence[Measurements]) -> dict[str, list[Measurements]]:
    """Models grouped by variant and number of experts, ``condconv, 4 experts``; static ones first."""
    series: dict[str, list[Measurements]] = {}
    for model in sorted(models, key=lambda model: model.profile.converted > 0):
        series.setdefault(_series_name(model.profile), []).append(model)
    return series


def _series_name(profile: Profile) -> str:
    layers = [layer for layer in profile.layers if layer.conditional]
    if not layers:
        return "static"
    kinds, experts = sorted({layer.kind for layer in layers}), sorted({layer.experts for layer in layers})
    count = "-".join(str(n) for n in dict.fromkeys((experts[0], experts[-1])))
    return f"{'/'.join(kinds)}, {count} expert{'s' if experts[-1] > 1 else ''}"
