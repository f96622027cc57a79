"""A profile as text that other programs read: CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from condconv_surgery.reporting.measure.model_profile import CONVENTION, Layer, Profile
from condconv_surgery.reporting.measure.other_counters import other_counters
from condconv_surgery.reporting.render.number_format import human, human_bytes, human_time, percent

if TYPE_CHECKING:
    from condconv_surgery.reporting.measure.routing_statistics import Routing
    from condconv_surgery.reporting.measure.run_cost import Cost

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
    """One line a layer under a header, and a last line ``total``. Plain numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for layer in profile.layers:
        writer.writerow(_csv_row(layer))
    macs, blank = profile.macs, [""] * 4
    before, after = profile.parameters_before, profile.parameters
    parts = [macs.convolution, macs.mixing, macs.routing, macs.attention]
    sizes = [profile.weight_bytes, profile.activation_bytes]
    writer.writerow(["total", *blank, before, after, profile.macs_before, macs.total, *parts, *sizes])
    return out.getvalue()


def to_markdown(profile: Profile, title: str, cost: Cost | None = None, routing: Routing | None = None) -> str:
    """A summary, what it costs to run, a table of the layers that multiply, the routing and the convention."""
    totals = [*summary_rows(profile), *(cost_rows(cost) if cost else [])]
    lines = [
        f"# {title}",
        "",
        f"Input {profile.input}; {profile.converted} of {profile.multiplying} layers conditional.",
        "",
        "| | before | after | change |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {before} | {after} | {change} |" for name, before, after, change in totals),
        "",
        "| layer | kind | shape | experts | parameters | MACs | convolution | mixing | routing | attention |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_markdown_row(layer) for layer in multiplying(profile)),
        "",
        *(f"{text}." for text in remainder(profile)),
        "",
        *(_routing_lines(routing) if routing else []),
        CONVENTION,
        "",
        other_counters(profile),
        *(["", latency_line(cost)] if cost and cost.latency else []),
    ]
    return "\n".join(lines) + "\n"


def summary_rows(profile: Profile) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change) of the totals, in words; a part's change is of the whole."""
    macs, before = profile.macs, profile.macs_before

    def row(name: str, a: int, b: int, form: Callable[[float], str] = human) -> tuple[str, str, str, str]:
        return (name, form(a), form(b), percent(a, b))

    rows = [row("parameters", profile.parameters_before, profile.parameters), row("MACs per image", before, macs.total)]
    for name in ("convolution", "mixing", "routing", "attention") if profile.converted else ():
        own = getattr(macs, name)
        added = 0 if name == "convolution" else own
        if own:
            rows.append((f"  {name}", human(own - added), human(own), percent(before, before + added)))
    rows.append(row("FLOPs per image", 2 * before, 2 * macs.total))
    rows.append(row("weights", profile.weight_bytes_before, profile.weight_bytes, human_bytes))
    outputs = profile.activation_bytes  # a conditional layer gives what the plain one gave
    return [*rows, row("outputs of all layers", outputs, outputs, human_bytes)]


def cost_rows(cost: Cost) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change) of memory and time, in words."""
    rows = [
        (f"peak activations, batch {p.batch}", human_bytes(p.before), human_bytes(p.after), percent(p.before, p.after))
        for p in cost.peaks
    ]
    for time in cost.latency:
        rows.append(
            (f"latency, batch {time.batch}", human_time(time.original), human_time(time.median), f"x{time.ratio:.2f}")
        )
    return rows


def latency_line(cost: Cost) -> str:
    """How the times were measured and how much they vary, in a sentence; empty where none were."""
    if not cost.latency:
        return ""
    spreads = ", ".join(f"{t.spread / t.median:.0%} of {t.repeats} at batch {t.batch}" for t in cost.latency)
    words = ", ".join(f"{name} {value}" for name, value in cost.environment)
    return (
        f"Latency: medians, original and model by turns in one run after {cost.latency[0].warm_up} passes to warm up; "
        f"interquartile range {spreads}; {words}."
    )


def measured_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """The columns of a comparison in which something was measured; the first, of names, always."""
    return [i for i in range(len(rows[0])) if i == 0 or any(row[i] != "-" for row in rows)]


def multiplying(profile: Profile) -> list[Layer]:
    """The rows that have products or are conditional: what a table shows one by one."""
    return [layer for layer in profile.layers if layer.macs.total or layer.conditional]


def remainder(profile: Profile) -> list[str]:
    """The other rows, by kind: ``20 BatchNorm2d with 9.6 k parameters``."""
    shown = {layer.name for layer in multiplying(profile)}
    kinds: dict[str, list[Layer]] = {}
    for layer in profile.layers:
        if layer.name not in shown:
            kinds.setdefault(layer.kind, []).append(layer)
    return [
        f"{len(rows)} {kind} with {human(sum(row.parameters for row in rows))} parameters"
        for kind, rows in kinds.items()
    ]


def _routing_lines(routing: Routing) -> list[str]:
    return [
        "## Routing",
        "",
        "| layer | used | variation | between classes | verdict |",
        "|---|---:|---:|---:|---|",
        *(
            f"| `{r.name}` | {r.used:.2f} of {r.experts} | {r.variation:.3f} | {r.between:.0%} | {r.verdict} |"
            for r in routing.layers
        ),
        "",
        routing.verdict,
        "",
    ]


def _csv_row(layer: Layer) -> list[str | int]:
    macs = layer.macs
    parts = [macs.convolution, macs.mixing, macs.routing, macs.attention]
    what: list[str | int] = [layer.name, layer.kind, layer.geometry, layer.experts, layer.calls]
    before, after = layer.parameters_before, layer.parameters
    return [*what, before, after, macs.convolution, macs.total, *parts, layer.weight_bytes, layer.activation_bytes]


def _markdown_row(layer: Layer) -> str:
    macs = layer.macs
    parts = [macs.total, macs.convolution, macs.mixing, macs.routing, macs.attention]
    numbers = " | ".join(human(n) for n in (layer.parameters, *parts))
    return f"| `{layer.name}` | {layer.kind} | {layer.geometry} | {layer.experts} | {numbers} |"
