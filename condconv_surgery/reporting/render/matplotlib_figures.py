"""matplotlib figures: make, draw a heat map, write as PNG and SVG. matplotlib is imported by the first call."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condconv_surgery.errors import InputError
from condconv_surgery.models.artifact.atomic_write import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAT = "#2b7fd9"
"""The colour of a heat map: of ``value`` between 0 and 1 it covers the share ``STRONGEST * value`` of what is below it,
white paper or the page. So text in the page's colour is readable on any cell, in light and in dark mode."""

STRONGEST = 0.7

MAX_COLUMNS_WITH_TEXT = 8
"""A heat map with at most this many columns also prints its values."""


def make_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches. Without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def remove_frame(axes: Any) -> None:
    """Hide the lines above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)


def heat_map(
    rows: Sequence[Sequence[float]],
    names: Sequence[str],
    title: str,
    columns: Sequence[str] = (),
    labels: tuple[str, str] = ("expert", "mean gate"),
) -> Figure:
    """One row per name; a value of 1 is darkest, of 0 (and NaN) empty: colours of all heat maps can be compared.

    columns: their names; by default their numbers. labels: of the horizontal axis and of the colours.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    count = max(map(len, rows))
    figure = make_figure(0.5 * count + 4, 0.22 * len(rows) + 1.6)
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("heat", [to_rgba(HEAT, 0.0), to_rgba(HEAT, STRONGEST)])
    image = axes.imshow(rows, aspect="auto", cmap=colours, vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set_xticks(range(count), columns or [str(i) for i in range(count)], fontsize=8.5)
    axes.set_xlabel(labels[0])
    if count <= MAX_COLUMNS_WITH_TEXT:
        _write_values(axes, rows)
    figure.colorbar(image, label=labels[1], shrink=min(1.0, 4 / figure.get_figheight()))
    return figure


def write_figures(folder: Path, figures: dict[str, Figure]) -> list[Path]:
    """Write ``NAME.png`` and ``NAME.svg`` of each figure into ``folder``, which is created. Raises ``InputError``."""
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{folder} cannot be created: {error}."
        raise InputError(reason, "Plots are written into a folder.", "another folder") from error
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            with replacing(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=160)
            files.append(path)
    return files


def to_svg(figure: Figure, name: str = "figure") -> str:
    """An ``<svg>`` element for a page: text stays text, no background, black becomes the colour of the page's text.

    name: ids of elements are derived from it, so that a page is reproducible and its figures share no id.
    """
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def _write_values(axes: Any, rows: Sequence[Sequence[float]]) -> None:
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8.5)
