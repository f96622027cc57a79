"""The report of one model as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from condconv_surgery.reporting.measure.cost_table import CONVENTION, Layer, Profile
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.measure.routing_statistics import Routing
from condconv_surgery.reporting.render import table_rows
from condconv_surgery.reporting.render.number_format import human

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


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """The rows as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def to_markdown(model: Measurements) -> str:
    """The totals, memory and latency, a table of the layers with MACs, the routing and the counting convention."""
    profile, cost, routing = model.profile, model.cost, model.routing
    totals = [*table_rows.summary_rows(profile), *(table_rows.cost_rows(cost) if cost else [])]
    lines = [
        f"# {model.title}",
        "",
        f"Input {profile.input}; {profile.converted} of {profile.multiplying} layers conditional.",
        "",
        "| | before | after | change |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {before} | {after} | {change} |" for name, before, after, change in totals),
        "",
        "| layer | kind | shape | experts | parameters | MACs | convolution | mixing | routing | attention |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_markdown_row(layer) for layer in table_rows.multiplying(profile)),
        "",
        *(f"{text}." for text in table_rows.remainder(profile)),
        "",
        *(_routing_lines(routing) if routing else []),
        CONVENTION,
        "",
        table_rows.other_counters(profile),
        *(["", table_rows.latency_line(cost)] if cost and cost.latency else []),
    ]
    return "\n".join(lines) + "\n"


def _or_empty(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _routing_lines(routing: Routing) -> list[str]:
    return [
        "## Routing",
        "",
        "| layer | used | variation | of kernels | between classes | verdict |",
        "|---|---:|---:|---:|---:|---|",
        *(
            f"| `{r.name}` | {r.used:.2f} of {r.experts} | {r.variation:.3f} | {_or_empty(r.kernels)} "
            f"| {r.between:.0%} | {r.verdict} |"
            for r in routing.layers
        ),
        "",
        routing.verdict,
        "",
    ]


def _csv_values(of: Layer | Profile, macs_before: int) -> list[int]:
    """The values in the columns from ``parameters_before`` on."""
    macs = of.macs
    parts = [macs.total, macs.convolution, macs.mixing, macs.routing, macs.attention]
    return [of.parameters_before, of.parameters, macs_before, *parts, of.weight_bytes, of.activation_bytes]


def _markdown_row(layer: Layer) -> str:
    macs = layer.macs
    parts = [macs.total, macs.convolution, macs.mixing, macs.routing, macs.attention]
    numbers = " | ".join(human(n) for n in (layer.parameters, *parts))
    return f"| `{layer.name}` | {layer.kind} | {layer.geometry} | {layer.experts} | {numbers} |"
