"""A report as one self-contained HTML page: no network, no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from condconv_surgery.reporting.images.attention_statistics import attention_line
from condconv_surgery.reporting.images.network_routing import Routing
from condconv_surgery.reporting.images.paired_models import differences_to_first
from condconv_surgery.reporting.images.predictions import Predictions
from condconv_surgery.reporting.measure.cost_table import CONVENTION
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.render import number_format, prediction_tables, table_rows
from condconv_surgery.reporting.render.answers import caveats, comparison_answer, report_answer
from condconv_surgery.reporting.render.comparison_table import HEADERS, measured_columns, rows_of, sort_keys
from condconv_surgery.reporting.render.matplotlib_figures import STRONGEST, to_svg
from condconv_surgery.reporting.render.plots import COSTS, PARTS, accuracy_against_cost, layer_costs, mean_gates
from condconv_surgery.reporting.study.paired_difference import Difference

if TYPE_CHECKING:
    import jinja2

THUMBNAIL = 56
"""Side of an image on the page, in pixels."""

MAX_CELLS = 20_000
"""Limit of table cells with gates by class, all layers together: about 1.5 MB. The most different classes are shown."""

MAX_CONFUSION = 20
"""Classes of a confusion matrix on the page; of more classes it shows as many of the most frequent confusions."""

MAX_THUMBNAILS = 600
"""Limit of images on one page: about 1.5 MB. The layers whose gates vary most come first."""


def report_page(model: Measurements) -> str:
    """The page of one model."""
    routing, figures = model.routing, {}
    if model.profile.macs.total:
        figures["layers"] = to_svg(layer_costs(model.profile), "layers")
    if routing and routing.layers:
        figures["experts"] = to_svg(mean_gates(routing), "experts")
    template = templates().get_template("report.html.j2")
    varying, static = table_rows.varying_and_static(routing) if routing else ([], [])
    return template.render(
        _context(model),
        answer=report_answer(model),
        provenance=model.provenance.rows(),
        tiles=table_rows.tiles(model),
        routing=routing,
        varying=varying,
        static=static,
        static_line=table_rows.static_line(static) if static else "",
        attention_line=attention_line(routing.attention) if routing and routing.attention else "",
        strongest=STRONGEST,
        plots=figures,
        **_predictions(model.predictions),
        **_images_and_classes(routing),
    )


def report_fragment(model: Measurements) -> str:
    """The totals and the layers only, for a notebook cell."""
    return templates().get_template("fragment.html.j2").render(_context(model))


def comparison_page(models: Sequence[Measurements]) -> str:
    """The page of several models: their table, and the plots if an accuracy is known."""
    rows, differences = rows_of(models), differences_to_first(models)
    keys = [sort_keys(model, difference) for model, difference in zip(models, differences, strict=True)]
    columns = measured_columns(rows)
    figures = []
    if any(model.accuracy is not None for model in models):  # two plots, side by side on a wide screen
        figures = [{"cost": cost, "svg": to_svg(accuracy_against_cost(models, [cost]), cost)} for cost in COSTS]
    template = templates().get_template("comparison.html.j2")
    return template.render(
        title="Comparison",
        answer=comparison_answer(models),
        provenance=[
            *(("file", model.provenance.file) for model in models if model.provenance.file),
            *(row for row in models[0].provenance.rows() if row[0] != "file"),
        ],
        notes=[*_paired_note(differences), *caveats(models)],
        headers=[HEADERS[i] for i in columns],
        rows=[[(row[i], key[i]) for i in columns] for row, key in zip(rows, keys, strict=True)],
        plots=figures,
        convention=CONVENTION,
    )


def _paired_note(differences: Sequence[Difference | None]) -> list[str]:
    """What the column of differences is, where there is one."""
    found = next((difference for difference in differences if difference is not None), None)
    if found is None:
        return []
    return [
        f"difference: points of top-1 to the first model over the same {found.images} images, paired, with the 95% "
        "interval over images. Bars of top-1: 95% interval of each model alone."
    ]


def _predictions(predictions: Predictions | None) -> dict[str, Any]:
    return {
        "predictions": predictions,
        "by_class": prediction_tables.worst_first(predictions) if predictions else [],
        "confusions": prediction_tables.confusions(predictions) if predictions else [],
        "calibration": prediction_tables.calibration_line(predictions) if predictions else "",
        "most_confusions": MAX_CONFUSION,
    }


def _context(model: Measurements) -> dict[str, Any]:
    layers = table_rows.multiplying(model.profile)
    headers, totals = table_rows.totals(model.profile, model.cost)
    return {
        "title": model.title,
        "profile": model.profile,
        "headers": headers,
        "totals": totals,
        "environment": table_rows.latency_line(model.cost, model.profile.converted > 0) if model.cost else "",
        "layers": layers,
        "largest": max((layer.macs.total for layer in layers), default=1) or 1,
        "remainder": table_rows.remainder(model.profile),
        "experts": {row.name: row for row in model.experts},
        "moved_known": any(row.moved is not None for row in model.experts),
        "convention": table_rows.convention(model.profile),
        "counters": table_rows.other_counters(model.profile),
        "parts": PARTS,
    }


def _images_and_classes(routing: Routing | None) -> dict[str, Any]:
    """The images on the page, each embedded once, and the classes of each layer's table, up to the limits above."""
    if routing is None:
        return {"thumbnails": {}, "layers_with_images": (), "classes_of": {}}
    layers_with_images, indices = [], set[int]()
    for layer in sorted(routing.layers, key=lambda layer: -layer.variation):
        top_images = {i for expert in layer.top for i in expert}
        if len(indices | top_images) <= MAX_THUMBNAILS:
            indices |= top_images
            layers_with_images.append(layer.name)
    most = max(1, MAX_CELLS // max(1, sum(layer.experts for layer in routing.layers)))
    return {
        "thumbnails": {i: _thumbnail(routing, i) for i in sorted(indices)},
        "layers_with_images": tuple(layers_with_images),
        "classes_of": {layer.name: layer.distinct_classes(most) for layer in routing.layers},
    }


def _thumbnail(routing: Routing, index: int) -> str:
    """A JPEG as a data URI."""
    image = routing.source.decode(index).copy()  # what is decoded may be the image of a data set in memory
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


@cache
def templates() -> jinja2.Environment:
    """The pages' templates, with the filters that they use."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("condconv_surgery.reporting.render"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for name in ("human", "human_bytes", "percent", "span"):
        environment.filters[name] = getattr(number_format, name)
    return environment
