"""A report as one HTML page that needs nothing beside it: no network, no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from condconv_surgery.models.preprocess import flat
from condconv_surgery.reporting.measure.model_profile import CONVENTION
from condconv_surgery.reporting.measure.other_counters import other_counters
from condconv_surgery.reporting.measure.report_images import open_picture
from condconv_surgery.reporting.render import number_format as numbers
from condconv_surgery.reporting.render.figures import to_svg
from condconv_surgery.reporting.render.plots import COSTS, PARTS, accuracy_against_cost, experts_used, layer_costs
from condconv_surgery.reporting.render.tables import (
    cost_rows,
    latency_line,
    measured_columns,
    multiplying,
    remainder,
    summary_rows,
)

if TYPE_CHECKING:
    import jinja2

    from condconv_surgery.reporting.full_report import Report
    from condconv_surgery.reporting.measure.routing_statistics import Routing

THUMBNAIL = 56
"""Pixels of a picture's side on the page."""

MOST_CELLS = 20_000
"""Gates by class on one page, of all layers: about 1.5 MB. Of more classes, those that differ most are shown."""

MOST_THUMBNAILS = 600
"""Pictures on one page: about 1.5 MB. The layers that differ most between pictures come first."""


def report_page(report: Report) -> str:
    """The page of one model."""
    routing, figures = report.routing, {}
    if report.profile.macs.total:
        figures["layers"] = to_svg(layer_costs(report.profile))
    if routing and routing.layers:
        figures["experts"] = to_svg(experts_used(routing))
    template = _environment().get_template("report.html.j2")
    return template.render(_context(report), routing=routing, plots=figures, **_seen(routing))


def report_fragment(report: Report) -> str:
    """The totals and the layers alone, for a notebook's cell."""
    return _environment().get_template("fragment.html.j2").render(_context(report))


def comparison_page(
    reports: Sequence[Report], headers: Sequence[str], rows: Sequence[Sequence[str]], values: Sequence[Sequence[float]]
) -> str:
    """The page of several models side by side; the plots where an accuracy is known. values: what rows sort by."""
    figures = []
    kept = measured_columns(rows)
    if any(report.accuracy is not None for report in reports):
        # two, which stand side by side where there is room
        figures = [{"cost": cost, "svg": to_svg(accuracy_against_cost(reports, [cost]))} for cost in COSTS]
    return (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            title="Comparison",
            headers=[headers[i] for i in kept],
            rows=[[(row[i], known[i]) for i in kept] for row, known in zip(rows, values, strict=True)],
            plots=figures,
            convention=CONVENTION,
        )
    )


def _context(report: Report) -> dict[str, Any]:
    layers = multiplying(report.profile)
    return {
        "title": report.title,
        "profile": report.profile,
        "summary": summary_rows(report.profile),
        "costs": cost_rows(report.cost) if report.cost else [],
        "environment": latency_line(report.cost) if report.cost else "",
        "layers": layers,
        "largest": max((layer.macs.total for layer in layers), default=1) or 1,
        "remainder": remainder(report.profile),
        "experts": {row.name: row for row in report.experts},
        "moved_known": any(row.moved is not None for row in report.experts),
        "convention": CONVENTION,
        "counters": other_counters(report.profile),
        "parts": PARTS,
        "accuracy": report.accuracy,
    }


def _seen(routing: Routing | None) -> dict[str, Any]:
    """The pictures on the page, once each however many experts like them, and the classes, as far as there is room."""
    if routing is None:
        return {"thumbnails": {}, "pictured": (), "shown": {}}
    pictured, indices = [], set[int]()
    for layer in sorted(routing.layers, key=lambda layer: -layer.variation):
        wanted = {i for expert in layer.top for i in expert}
        if len(indices | wanted) <= MOST_THUMBNAILS:
            indices |= wanted
            pictured.append(layer.name)
    most = max(1, MOST_CELLS // max(1, sum(layer.experts for layer in routing.layers)))
    return {
        "thumbnails": {i: _thumbnail(routing.files[i]) for i in sorted(indices)},
        "pictured": tuple(pictured),
        "shown": {layer.name: layer.distinct_classes(most) for layer in routing.layers},
    }


def _thumbnail(file: str) -> str:
    """A JPEG as a data URI."""
    picture = flat(open_picture(file))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("condconv_surgery.reporting.render"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for name in ("human", "human_bytes", "percent"):
        environment.filters[name] = getattr(numbers, name)
    return environment
