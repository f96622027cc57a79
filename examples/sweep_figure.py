"""The figure of mobilenet_sweep.py: accuracy against multiply-adds, a line per width, a point per number of experts."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter

from condconv_surgery.reporting.render.matplotlib_figures import make_figure, remove_frame, write_figures
from condconv_surgery.reporting.render.plots import SERIES

Rows = list[dict[str, Any]]
Point = tuple[int, float, float, float, float]


def draw(rows: Rows, folder: Path, name: str = "mobilenet-sweep") -> list[Path]:
    """Write ``NAME.png`` and ``NAME.svg``: at the size of the task's images, and at 224 px where that is another."""
    if not rows:
        raise SystemExit("There is no finished point to draw.")
    size = rows[0]["size"]
    panels = {"macs": f"millions of multiply-adds at {size} px"}
    if size != 224:
        panels["macs_224"] = "the same networks at 224 px"
    figure = make_figure(4.8 * len(panels), 4.2)
    for position, (cost, label) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), position + 1)
        _panel(axes, rows, cost)
        axes.set_xlabel(label)
        if position == 0:
            axes.set_ylabel("top-1, %")
            axes.legend(frameon=False, loc="lower right")
    return write_figures(folder, {name: figure})


def _panel(axes: Any, rows: Rows, cost: str) -> None:
    """Means over the seeds, bars from the lowest to the highest seed; the static networks are joined by dashes."""
    widths = sorted({row["width"] for row in rows})
    static = []
    for colour, width in zip(SERIES * len(widths), widths, strict=False):
        points = [_point(rows, width, n, cost) for n in sorted({r["experts"] for r in rows if r["width"] == width})]
        x, mean, low, high = ([point[i] for point in points] for i in range(1, 5))
        bars = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
        axes.errorbar(x, mean, yerr=bars, fmt="o-", color=colour, markersize=5, capsize=3, label=f"width {width:g}")
        for experts, at, _, _, top in _apart(points, [row[cost] / 1e6 for row in rows]):
            axes.annotate(str(experts), (at, top), (0, 4), textcoords="offset points", ha="center", fontsize=8.5)
        static += [point for point in points if point[0] == 1]
    axes.plot([p[1] for p in static], [p[2] for p in static], "--", color="#888888", zorder=0, label="static")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)
    remove_frame(axes)


def _apart(points: list[Point], costs: list[float]) -> list[Point]:
    """The last point, and before it those whose labels leave room for one another: a twentieth of the axis."""
    room = math.log(max(costs) / min(costs)) / 20
    kept = points[-1:]
    for point in reversed(points[:-1]):
        if math.log(kept[0][1] / point[1]) >= room:
            kept.insert(0, point)
    return kept


def _point(rows: Rows, width: float, experts: int, cost: str) -> Point:
    """Number of experts, millions of multiply-adds; mean, lowest and highest top-1 in percent."""
    found = [row for row in rows if (row["width"], row["experts"]) == (width, experts)]
    top1 = [100 * row["top1"] for row in found]
    return experts, found[0][cost] / 1e6, statistics.mean(top1), min(top1), max(top1)
