"""The pictures of a report. matplotlib is imported when the first is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condconv_surgery.errors import InputError
from condconv_surgery.models.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from condconv_surgery.reporting.model_profile import Profile
    from condconv_surgery.reporting.reports import Report
    from condconv_surgery.reporting.routing import LayerRouting, Routing

PARTS = {"convolution": "#8aa0b8", "mixing": "#e07b39", "routing": "#2a7f62", "attention": "#8e5bb5"}
"""Colours that stay apart in grey print and for the colour-blind; the page uses the same."""


def layer_costs(profile: Profile) -> Figure:
    """MACs of each layer, stacked by what they are for."""
    layers = [layer for layer in profile.layers if layer.macs.total]
    figure = _figure(8, 0.22 * len(layers) + 1.4)
    axes = figure.subplots()
    left = [0.0] * len(layers)
    for part, colour in PARTS.items():
        widths = [getattr(layer.macs, part) / 1e6 for layer in layers]
        if any(widths):
            axes.barh(range(len(layers)), widths, left=left, color=colour, label=part, height=0.8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=6)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlabel("millions of MACs per image")
    axes.legend(frameon=False)
    _plain(axes)
    return figure


def experts_used(routing: Routing) -> Figure:
    """For each layer the mean gate of each expert, darker for more, and the effective number of experts."""
    layers = routing.layers
    widest = max(layer.experts for layer in layers)
    gates = [[*layer.mean, *[float("nan")] * (widest - layer.experts)] for layer in layers]
    figure = _figure(0.4 * widest + 4, 0.22 * len(layers) + 1.4)
    axes = figure.subplots()
    image = axes.imshow(gates, aspect="auto", cmap="cividis_r", vmin=0, vmax=1)
    axes.set_yticks(range(len(layers)), [f"{la.name}  ({la.used:.1f} of {la.experts})" for la in layers], fontsize=6)
    axes.set_xticks(range(widest))
    axes.set_xlabel("expert")
    figure.colorbar(image, label="mean gate over all pictures")
    return figure


def gates_by_class(layer: LayerRouting, classes: Sequence[str]) -> Figure:
    """Mean gates of one layer for each class."""
    figure = _figure(0.4 * layer.experts + 4, 0.25 * len(classes) + 1.4)
    axes = figure.subplots()
    image = axes.imshow(layer.by_class, aspect="auto", cmap="cividis_r", vmin=0)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    axes.set_xticks(range(layer.experts))
    axes.set_xlabel(f"expert of {layer.name}")
    figure.colorbar(image, label="mean gate")
    return figure


def accuracy_against_cost(reports: Sequence[Report]) -> Figure:
    """Accuracy against MACs and against parameters, in the manner of CondConv's figure. Unknown accuracy is left out.

    Raises ``InputError`` when no accuracy is known.
    """
    known = [report for report in reports if report.accuracy is not None]
    if not known:
        raise InputError(
            "No accuracy is known of these models.",
            "It comes from the run's metrics.jsonl beside best.safetensors, or from pictures.",
            "--data FOLDER",
        )
    figure = _figure(9, 4)
    for axes, (label, value) in zip(figure.subplots(1, 2), _axes_of(known), strict=True):
        for report, x in zip(known, value, strict=True):
            axes.scatter([x], [100 * (report.accuracy or 0.0)], marker="o" if report.profile.converted else "s", s=36)
            axes.annotate(
                report.title, (x, 100 * (report.accuracy or 0.0)), xytext=(5, 4), textcoords="offset points", fontsize=7
            )
        axes.set_xlabel(label)
        axes.set_ylabel("top-1, %")
        axes.margins(0.25)
        _plain(axes)
    return figure


def write(folder: Path, figures: dict[str, Figure]) -> list[Path]:
    """Each figure as ``NAME.png`` and ``NAME.svg`` in ``folder``, which is made. Raises ``InputError``."""
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error}.", "Plots go into a folder.", "--plots DIR") from error
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            with replacing(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=160)
            files.append(path)
    return files


def to_svg(figure: Figure) -> str:
    """An ``<svg>`` element for a page: no background, black ink in the colour of the text around it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def _axes_of(reports: Sequence[Report]) -> list[tuple[str, list[float]]]:
    return [
        ("millions of MACs per image", [report.profile.macs.total / 1e6 for report in reports]),
        ("millions of parameters", [report.profile.parameters / 1e6 for report in reports]),
    ]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
