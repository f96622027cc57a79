"""The report of one model as CSV and as Markdown."""

from __future__ import annotations

from condconv_surgery.reporting.images.attention_statistics import attention_line
from condconv_surgery.reporting.images.network_routing import Routing
from condconv_surgery.reporting.images.predictions import Predictions
from condconv_surgery.reporting.measure.cost_table import Layer, Profile
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.render import prediction_tables, table_rows
from condconv_surgery.reporting.render.answers import report_answer
from condconv_surgery.reporting.render.csv_text import csv_text
from condconv_surgery.reporting.render.number_format import human, span

COLUMNS = (
    "name",
    "kind",
    "geometry",
    "experts",
    "calls",
    "parameters_before",
    "parameters",
    "macs_before",
    "macs",
    "convolution",
    "mixing",
    "routing",
    "attention",
    "weight_bytes",
    "activation_bytes",
)


def to_csv(profile: Profile) -> str:
    """One line per layer under a header, and a last line ``total``. Plain numbers."""
    rows = [
        [row.name, row.kind, row.geometry, row.experts, row.calls, *_csv_values(row, row.macs.convolution)]
        for row in profile.layers
    ]
    return csv_text([COLUMNS, *rows, ["total", *[""] * 4, *_csv_values(profile, profile.macs_before)]])


def to_markdown(model: Measurements) -> str:
    """The totals, memory and latency, a table of the layers with MACs, the routing and the counting convention."""
    profile, cost, routing, provenance = model.profile, model.cost, model.routing, model.provenance.rows()
    lines = [
        f"# {model.title}",
        "",
        f"**{report_answer(model)}**",
        "",
        f"Input {profile.input}; {profile.converted} of {profile.multiplying} layers conditional.",
        "",
        *_total_lines(model),
        "",
        *_layer_lines(profile),
        "",
        *(f"{text}." for text in table_rows.remainder(profile)),
        "",
        *(_prediction_lines(model.predictions) if model.predictions else []),
        *(_routing_lines(routing) if routing else []),
        table_rows.convention(profile),
        "",
        table_rows.other_counters(profile),
        *(["", table_rows.latency_line(cost, profile.converted > 0)] if cost and cost.latency else []),
        *([""] if provenance else []),
        *(f"{name}: {value}  " for name, value in provenance),
    ]
    return "\n".join(lines) + "\n"


def _total_lines(model: Measurements) -> list[str]:
    headers, rows = table_rows.totals(model.profile, model.cost)
    head = "| " + "".join(f"| {header} " if header else "| " for header in headers) + "|"
    return [head, "|---|" + "---:|" * len(headers), *("| " + " | ".join(row) + " |" for row in rows)]


def _prediction_lines(predictions: Predictions) -> list[str]:
    rows = [
        f"| {row.name} | {row.images} | {row.right} | {row.accuracy:.1%} "
        f"| {span(row.interval)} | {row.confused[0] if row.confused else ''} |"
        for row in prediction_tables.worst_first(predictions)
    ]
    head = [
        "| class | images | right | accuracy | 95% interval | most confused with |",
        "|---|---:|---:|---:|---:|---|",
    ]
    notes = [note for note in (prediction_tables.calibration_line(predictions), predictions.caveats) if note]
    return ["## Predictions", "", *(head if rows else []), *rows, "", *notes, ""]


def _or_empty(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _routing_lines(routing: Routing) -> list[str]:
    gates = [
        f"| `{r.name}` | {r.used:.2f} of {r.experts} | {r.variation:.3f} | {_or_empty(r.kernels)} "
        f"| {r.between:.0%} | {r.verdict} |"
        for r in routing.layers
    ]
    if gates:
        header = [
            "| layer | used | variation | of kernels | between classes | verdict |",
            "|---|---:|---:|---:|---:|---|",
        ]
        gates = [*header, *gates, ""]
    return ["## Routing", "", *gates, *_attention_lines(routing), routing.verdict, ""]


def _attention_lines(routing: Routing) -> list[str]:
    rows = [
        f"| `{r.name}` | {r.spread:.3f} | {_or_empty(r.channels)} | {_or_empty(r.filters)} | {_or_empty(r.positions)} "
        f"| {r.between:.0%} |"
        for r in routing.attention
    ]
    if not rows:
        return []
    header = ["| layer | scales vary | input channels | filters | positions | between classes |", f"|---|{'---:|' * 5}"]
    return [*header, *rows, "", attention_line(routing.attention), ""]


def _csv_values(of: Layer | Profile, macs_before: int) -> list[int]:
    """The values in the columns from ``parameters_before`` on."""
    macs = of.macs
    parts = [macs.total, macs.convolution, macs.mixing, macs.routing, macs.attention]
    return [of.parameters_before, of.parameters, macs_before, *parts, of.weight_bytes, of.activation_bytes]


def _layer_lines(profile: Profile) -> list[str]:
    """The table of the layers; the columns of conditional layers only where there are some."""
    parts = ("convolution", "mixing", "routing", "attention") if profile.converted else ()
    headers = ["layer", "kind", "shape", *(["experts"] if profile.converted else []), "parameters", "MACs", *parts]
    lines = ["| " + " | ".join(headers) + " |", "|---|---|---|" + "---:|" * (len(headers) - 3)]
    for layer in table_rows.multiplying(profile):
        experts = [str(layer.experts)] if profile.converted else []
        numbers = (layer.parameters, layer.macs.total, *(getattr(layer.macs, part) for part in parts))
        cells = [f"`{layer.name}`", layer.kind, layer.geometry, *experts, *map(human, numbers)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
