"""Figures to files and pages. matplotlib is imported when the first is drawn."""

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

INK = "#1b1f24"
"""On a light cell. Black would turn light on a dark page (``to_svg``), and the cell would not."""

MOST_EXPERTS_IN_NUMBERS = 8
"""Up to so many columns a heat map also prints its numbers."""


def make_figure(width: float, height: float) -> Figure:
    """Of these inches; without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def without_frame(axes: Any) -> None:
    """Leave out the lines above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)


def heat_map(rows: Sequence[Sequence[float]], names: Sequence[str], title: str, low: float, high: float) -> Figure:
    """A row for each name and a column for each expert, darker for more; NaN is left empty."""
    columns = max(map(len, rows))
    figure = make_figure(0.5 * columns + 4, 0.22 * len(rows) + 1.6)
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", cmap="Blues", vmin=low, vmax=high)
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set_xticks(range(columns))
    axes.set_xlabel("expert")
    if columns <= MOST_EXPERTS_IN_NUMBERS:
        _numbers(axes, rows, low + 0.6 * (high - low))
    figure.colorbar(image, label="mean gate", shrink=min(1.0, 4 / figure.get_figheight()))
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
    """An ``<svg>`` element for a page: text as text, no background, black ink in the colour of the text around it."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def _numbers(axes: Any, rows: Sequence[Sequence[float]], dark: float) -> None:
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if not math.isnan(value):
                colour = "white" if value > dark else INK
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=colour)
