"""The plots of a report: MACs per layer, mean gates, accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from condconv_surgery.errors import InputError
from condconv_surgery.reporting.images.network_routing import Routing
from condconv_surgery.reporting.images.predictions import Predictions
from condconv_surgery.reporting.images.routing_statistics import LayerRouting
from condconv_surgery.reporting.measure.cost_table import Profile
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.render.matplotlib_figures import heat_map, make_figure, remove_frame
from condconv_surgery.reporting.render.short_names import unique_short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {"convolution": "#8aa0b8", "mixing": "#e07b39", "routing": "#2a7f62", "attention": "#8e5bb5"}
"""Colours that differ in greyscale print and for colour-blind readers. The HTML page uses the same."""

MAX_CLASSES = 100
"""Limit of rows of a heat map: one of 1000 classes is 35,000 pixels high."""

SERIES = ("#5b6570", "#e07b39", "#2a7f62", "#8e5bb5", "#0b5cad", "#b3261e")

COSTS = {
    "MACs per image": lambda model: model.profile.macs.total,
    "parameters": lambda model: model.profile.parameters,
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
    return heat_map(gates, names, "mean gates over all images")


def gates_by_class(layer: LayerRouting, classes: Sequence[str]) -> Figure:
    """Mean gates of one layer per class. Of more than ``MAX_CLASSES`` classes, those that differ most are drawn."""
    drawn = layer.distinct_classes(MAX_CLASSES)
    every = len(drawn) == len(classes)
    which = "by class" if every else f"of the {len(drawn)} of {len(classes)} classes that differ most"
    gates, names = [layer.by_class[c] for c in drawn], [classes[c] for c in drawn]
    return heat_map(gates, names, f"{layer.name}: mean gates {which}")


def confusion_matrix(predictions: Predictions) -> Figure:
    """Share of each class (row) that is predicted as each class (column)."""
    shares = [[count / max(1, sum(row)) for count in row] for row in predictions.confusion]
    columns = [*predictions.classes, *["another"] * (len(shares[0]) - len(predictions.classes))]
    short = columns if max(map(len, columns)) < 5 else [str(i) for i in range(len(columns))]
    names = list(predictions.classes) if short is columns else [f"{i}  {c}" for i, c in enumerate(predictions.classes)]
    labels = ("predicted class", "share of the class's images")
    return heat_map(shares, names, f"confusion matrix of {len(predictions.images)} images", short, labels)


def accuracy_against_cost(models: Sequence[Measurements], costs: Sequence[str] = tuple(COSTS)) -> Figure:
    """Accuracy with its 95% interval against cost, like CondConv's figure: a line per variant and number of experts.

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
        unit, scale = ("millions", 1e6) if max(map(COSTS[cost], known)) >= 1e6 else ("thousands", 1e3)
        for (name, members), colour in zip(_series(known).items(), SERIES * len(known), strict=False):
            points = sorted(
                (COSTS[cost](m) / scale, 100 * (m.accuracy or 0.0), labels[m.title], _bars(m)) for m in members
            )
            x, y, bars = [p[0] for p in points], [p[1] for p in points], [p[3] for p in points]
            axes.plot(x, y, "-", color=colour, linewidth=1)
            axes.errorbar(x, y, yerr=list(zip(*bars, strict=True)), fmt="o", color=colour, capsize=4, label=name)
            for across, up, text, _ in points:
                axes.annotate(text, (across, up), xytext=(7, 0), textcoords="offset points", fontsize=10.5, va="center")
        axes.tick_params(labelsize=10.5)
        axes.locator_params(axis="x", nbins=4)  # more ticks overlap when the numbers are long
        axes.set_xlabel(f"{unit} of {cost}", fontsize=10.5)
        axes.set_ylabel(f"top-1, % {_counted(known)}", fontsize=10.5)
        axes.margins(0.3, 0.2)
        low, high = axes.get_ylim()
        axes.set_ylim(
            max(low, -0.03 * high), min(high, 100 + 0.03 * (100 - low))
        )  # there is nothing beyond 0 and 100 %
        axes.legend(frameon=False, fontsize=10.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        remove_frame(axes)
    return figure


def _bars(model: Measurements) -> tuple[float, float]:
    """Percentage points from the accuracy down and up to the ends of its 95% interval; 0 where it is not known."""
    interval, accuracy = model.accuracy_interval, model.accuracy or 0.0
    if interval is None:
        return 0.0, 0.0
    return max(0.0, 100 * (accuracy - interval[0])), max(0.0, 100 * (interval[1] - accuracy))


def _counted(models: Sequence[Measurements]) -> str:
    """The number of images behind the accuracies, and what the bars are."""
    counts = sorted({model.accuracy_images for model in models} - {0})
    if not counts:
        return ""
    which = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"({which} images, bars: 95%)"


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
