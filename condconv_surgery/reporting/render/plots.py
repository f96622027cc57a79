"""The plots of a report: what each layer costs, what the gates do, accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from condconv_surgery.errors import InputError
from condconv_surgery.reporting.render.figures import heat_map, make_figure, without_frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from condconv_surgery.reporting.full_report import Report
    from condconv_surgery.reporting.measure.model_profile import Profile
    from condconv_surgery.reporting.measure.routing_statistics import LayerRouting, Routing

PARTS = {"convolution": "#8aa0b8", "mixing": "#e07b39", "routing": "#2a7f62", "attention": "#8e5bb5"}
"""Colours that stay apart in grey print and for the colour-blind; the page uses the same."""

MOST_CLASSES = 100
"""Rows of a heat map; a picture of a thousand is 35,000 pixels high."""

SERIES = ("#5b6570", "#e07b39", "#2a7f62", "#8e5bb5", "#0b5cad", "#b3261e")

COSTS = {
    "millions of MACs per image": lambda report: report.profile.macs.total / 1e6,
    "millions of parameters": lambda report: report.profile.parameters / 1e6,
}
"""The axes of accuracy against cost."""


def layer_costs(profile: Profile, title: str = "") -> Figure:
    """MACs of each layer, stacked by what they are for."""
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
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False)  # nowhere among bars is there room
    without_frame(axes)
    return figure


def experts_used(routing: Routing) -> Figure:
    """For each layer the mean gate of each expert, and the effective number of experts."""
    layers = routing.layers
    widest = max(layer.experts for layer in layers)
    gates = [[*layer.mean, *[float("nan")] * (widest - layer.experts)] for layer in layers]
    names = [f"{layer.name}  ({layer.used:.1f} of {layer.experts})" for layer in layers]
    high = max(2 / widest, *(max(layer.mean) for layer in layers))  # an equal share is the middle of the colours
    return heat_map(gates, names, "mean gates over all pictures", 0.0, high)


def gates_by_class(layer: LayerRouting, classes: Sequence[str]) -> Figure:
    """Mean gates of one layer for each class; the colours span what occurs, however little that is.

    Of more than ``MOST_CLASSES``, those that differ most.
    """
    low, high = min(map(min, layer.by_class)), max(map(max, layer.by_class))
    shown = layer.distinct_classes(MOST_CLASSES)
    what = (
        "by class" if len(shown) == len(classes) else f"of the {len(shown)} of {len(classes)} classes that differ most"
    )
    return heat_map(
        [layer.by_class[c] for c in shown],
        [classes[c] for c in shown],
        f"{layer.name}: mean gates {what}",
        low,
        high,
    )


def accuracy_against_cost(reports: Sequence[Report], costs: Sequence[str] = tuple(COSTS)) -> Figure:
    """Accuracy against cost, in the manner of CondConv's figure: a line for each variant and number of experts.

    A model of unknown accuracy is left out. Raises ``InputError`` when no accuracy is known.
    """
    known = [report for report in reports if report.accuracy is not None]
    if not known:
        raise InputError(
            "No accuracy is known of these models.",
            "It comes from the run's metrics.jsonl beside best.safetensors, or from pictures.",
            "--data FOLDER",
        )
    labels = shortest([report.title for report in known])
    figure = make_figure(4.6 * len(costs), 3.8)
    for place, cost in enumerate(costs):
        axes = figure.add_subplot(1, len(costs), place + 1)
        for (name, members), colour in zip(_series(known).items(), SERIES * len(known), strict=False):
            at = sorted(
                (COSTS[cost](report), 100 * (report.accuracy or 0.0), labels[report.title]) for report in members
            )
            axes.plot([x for x, _, _ in at], [y for _, y, _ in at], "o-", color=colour, label=name, markersize=6)
            for x, y, text in at:
                axes.annotate(text, (x, y), xytext=(0, 7), textcoords="offset points", fontsize=10.5, ha="center")
        axes.tick_params(labelsize=10.5)
        axes.locator_params(axis="x", nbins=4)  # more run into each other where numbers are long
        axes.set_xlabel(cost, fontsize=10.5)
        axes.set_ylabel("top-1, %", fontsize=10.5)
        axes.margins(0.25)
        axes.legend(frameon=False, fontsize=10.5)
        without_frame(axes)
    return figure


def short(title: str) -> str:
    """What tells models apart: the folder of a run, the name of another file.

    >>> short("runs/a/best.safetensors"), short("models/b.safetensors"), short("torchvision:resnet18")
    ('a', 'b', 'torchvision:resnet18')
    """
    path = PurePath(title)
    if path.suffix != ".safetensors":
        return title
    return path.parent.name if path.stem in ("best", "last") and path.parent.name else path.stem


def shortest(titles: Sequence[str]) -> dict[str, str]:
    """``short`` of each, with the name of the file where that alone does not tell them apart.

    >>> shortest(["a/best.safetensors", "a/last.safetensors", "b/best.safetensors"])
    {'a/best.safetensors': 'a/best', 'a/last.safetensors': 'a/last', 'b/best.safetensors': 'b'}
    """
    names = [short(title) for title in dict.fromkeys(titles)]
    return {t: short(t) if names.count(short(t)) == 1 else f"{short(t)}/{PurePath(t).stem}" for t in titles}


def _series(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """Reports by what their conditional layers are, ``condconv, 4 experts``; plain ones first."""
    found: dict[str, list[Report]] = {}
    for report in sorted(reports, key=lambda report: report.profile.converted > 0):
        found.setdefault(_kind(report.profile), []).append(report)
    return found


def _kind(profile: Profile) -> str:
    layers = [layer for layer in profile.layers if layer.conditional]
    if not layers:
        return "static"
    kinds, experts = sorted({layer.kind for layer in layers}), sorted({layer.experts for layer in layers})
    count = "-".join(str(n) for n in dict.fromkeys((experts[0], experts[-1])))
    return f"{'/'.join(kinds)}, {count} expert{'s' if experts[-1] > 1 else ''}"
