"""The plot of a study: differences with error bars, and the same against cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from condconv_surgery.recipe.study_record import StudyRecord
from condconv_surgery.reporting.render.matplotlib_figures import make_figure, remove_frame
from condconv_surgery.reporting.render.plots import SERIES
from condconv_surgery.reporting.study.study_results import ArmResult, StudyResults, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def study_figure(record: StudyRecord, results: StudyResults) -> Figure:
    """Left: a row for each arm with its 95% interval. Right: the same differences against each cost that is known."""
    arms = [arm for arm in results.arms if arm.difference is not None]
    baseline = next((arm for arm in results.arms if arm.difference is None), None)
    costs = _costs(results)
    colours = {arm.name: SERIES[1 + i % (len(SERIES) - 1)] for i, arm in enumerate(arms)}
    figure = make_figure(4.6 + 3.2 * len(costs), max(3.0, 1.4 + 0.6 * len(arms)))
    axes = figure.subplots(1, 1 + len(costs), squeeze=False, width_ratios=[1.3, *[1] * len(costs)])[0]
    _forest(axes[0], arms, colours, record.baseline)
    for panel, (label, values) in zip(axes[1:], costs.items(), strict=True):
        for arm in arms:
            _bar(panel, values[arm.name], arm, colours[arm.name])
        if baseline is not None:
            panel.plot(values[baseline.name], 0, "o", color=SERIES[0], markersize=6)
            panel.annotate(baseline.name, (values[baseline.name], 0), **_text_at(6, 5, SERIES[0]))
        panel.axhline(0, color=SERIES[0], linewidth=0.8, zorder=0)
        panel.set_xlabel(label)
        panel.set_ylabel("difference, points")
        panel.margins(x=0.18, y=0.12)
        panel.locator_params(axis="x", nbins=4)
        remove_frame(panel)
    return figure


def _forest(axes: Any, arms: list[ArmResult], colours: dict[str, str], baseline: str) -> None:
    for row, arm in enumerate(arms):
        found = arm.difference
        assert found is not None
        colour, x = colours[arm.name], 100 * found.mean
        axes.errorbar(x, row, xerr=100 * found.half, fmt="o", color=colour, capsize=4, markersize=6)
        axes.annotate(points(found), (x, row), ha="center", **_text_at(0, 7, colour))
    axes.axvline(0, color=SERIES[0], linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    for label, arm in zip(axes.get_yticklabels(), arms, strict=True):
        label.set_color(colours[arm.name])
    axes.set_ylim(len(arms) - 0.4, -0.7)
    axes.set_xlabel(f"difference of top-1 to {baseline}, points, 95% interval")
    axes.margins(x=0.12)
    remove_frame(axes)


def _text_at(x: float, y: float, colour: str) -> dict[str, Any]:
    """Place and look of a small text, ``x`` and ``y`` points away from what it describes."""
    return {"xytext": (x, y), "textcoords": "offset points", "fontsize": 9, "color": colour}


def _bar(axes: Any, x: float, arm: ArmResult, colour: str) -> None:
    assert arm.difference is not None
    y, half = 100 * arm.difference.mean, 100 * arm.difference.half
    axes.errorbar(x, y, yerr=half, fmt="o", color=colour, capsize=4, markersize=6)


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
