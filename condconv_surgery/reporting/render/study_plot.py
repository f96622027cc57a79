"""The plot of a study: differences with error bars, and the same against cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, Any

from condconv_surgery.recipe.study_record import StudyRecord
from condconv_surgery.reporting.render.matplotlib_figures import make_figure, remove_frame
from condconv_surgery.reporting.render.plots import SERIES
from condconv_surgery.reporting.study.study_results import ArmResult, StudyResults, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_BREAK = "\u00a0"

NAME_WIDTH = 52
"""Characters of a line of an arm's name."""


def study_figure(record: StudyRecord, results: StudyResults) -> Figure:
    """All panels side by side: a row for each arm with its 95% interval; the same differences against each cost."""
    panels = _panels(record, results)
    figure = make_figure(4.6 + 3.2 * (len(panels) - 1), _height(results))
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[1.3, *[1] * (len(panels) - 1)])[0]
    for panel, draw in zip(axes, panels.values(), strict=True):
        draw(panel)
    return figure


def study_panels(record: StudyRecord, results: StudyResults) -> dict[str, Figure]:
    """Each panel as a figure of its own, narrow enough for a phone, by what it shows."""
    figures = {}
    for label, draw in _panels(record, results).items():
        figures[label] = make_figure(4.2, _height(results))
        draw(figures[label].subplots())
    return figures


def _height(results: StudyResults) -> float:
    return max(3.0, 1.4 + 0.6 * len(results.arms))


def _panels(record: StudyRecord, results: StudyResults) -> dict[str, Callable[[Any], None]]:
    """What draws each panel on its axes, by what it shows."""
    arms = [arm for arm in results.arms if arm.difference is not None]
    baseline = next((arm for arm in results.arms if arm.difference is None), None)
    colours = {arm.name: SERIES[1 + i % (len(SERIES) - 1)] for i, arm in enumerate(arms)}
    panels: dict[str, Callable[[Any], None]] = {"by arm": partial(_forest, arms, colours, record.baseline)}
    for label, values in _costs(results).items():
        panels[f"against {label}"] = partial(_against_cost, arms, colours, baseline, label, values)
    return panels


def _forest(arms: list[ArmResult], colours: dict[str, str], baseline: str, axes: Any) -> None:
    """A row for each arm; its name stands above its interval, so that long names take no width."""
    for row, arm in enumerate(arms):
        found = arm.difference
        assert found is not None
        colour = colours[arm.name]
        axes.errorbar(100 * found.mean, row, xerr=100 * found.half, fmt="o", color=colour, capsize=4, markersize=6)
        text = {"transform": axes.get_yaxis_transform(), "color": colour, "fontsize": 9, "va": "bottom"}
        axes.text(0.02, row - 0.14, fill(f"{arm.name}  {points(found).replace(' ', NO_BREAK)}", NAME_WIDTH), **text)
        axes.vlines(0, row - 0.1, row + 0.3, color=SERIES[0], linewidth=0.8, zorder=0)  # not through the names
    axes.set_yticks([])
    axes.set_ylim(len(arms) - 0.5, -0.8)
    axes.set_xlabel(f"difference of top-1 to {baseline}, points, 95% interval")
    axes.margins(x=0.12)
    axes.spines["left"].set_visible(False)
    remove_frame(axes)


def _against_cost(
    arms: list[ArmResult],
    colours: dict[str, str],
    baseline: ArmResult | None,
    label: str,
    values: dict[str, float],
    axes: Any,
) -> None:
    for arm in arms:
        assert arm.difference is not None
        y, half = 100 * arm.difference.mean, 100 * arm.difference.half
        axes.errorbar(values[arm.name], y, yerr=half, fmt="o", color=colours[arm.name], capsize=4, markersize=6)
    if baseline is not None:
        axes.plot(values[baseline.name], 0, "o", color=SERIES[0], markersize=6)
        place = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 9, "color": SERIES[0]}
        axes.annotate(baseline.name, (values[baseline.name], 0), **place)
    axes.axhline(0, color=SERIES[0], linewidth=0.8, zorder=0)
    axes.set_xlabel(label)
    axes.set_ylabel("difference, points")
    axes.margins(x=0.18, y=0.12)
    axes.locator_params(axis="x", nbins=4)
    remove_frame(axes)


def _costs(results: StudyResults) -> dict[str, dict[str, float]]:
    """The costs that are known of all arms: label of the axis, and the value of each arm."""
    found: dict[str, dict[str, float]] = {}
    scale = 1e6 if all((arm.record.cost.macs or 0) >= 1e6 for arm in results.arms) else 1e3
    getters: dict[str, Any] = {
        f"{'millions' if scale == 1e6 else 'thousands'} of MACs per image": lambda c: c.macs and c.macs / scale,
        "latency of one image, ms": lambda c: c.latency and 1e3 * c.latency,
    }
    for label, get in getters.items():
        values = {arm.name: get(arm.record.cost) for arm in results.arms}
        if values and all(value is not None for value in values.values()):
            found[label] = values
    return found
