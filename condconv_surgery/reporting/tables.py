"""A profile as text that other programs read: CSV and Markdown."""

from __future__ import annotations

import csv
import io

from condconv_surgery.reporting.model_profile import CONVENTION, Layer, Profile
from condconv_surgery.reporting.numbers import human, human_bytes, percent

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
    """One line a layer under a header, and a last line ``total``. Plain numbers, RFC 4180."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for layer in profile.layers:
        writer.writerow(_csv_row(layer))
    macs, blank = profile.macs, [""] * 4
    before, after = profile.parameters_before, profile.parameters
    parts = [macs.convolution, macs.mixing, macs.routing, macs.attention]
    sizes = [profile.weight_bytes, profile.activation_bytes]
    writer.writerow(["total", *blank, before, after, profile.macs_before, macs.total, *parts, *sizes])
    return out.getvalue()


def to_markdown(profile: Profile, title: str) -> str:
    """A summary, a table of the layers that multiply, and the convention."""
    lines = [
        f"# {title}",
        "",
        f"Input {profile.input}; {profile.converted} of {len(multiplying(profile))} layers conditional.",
        "",
        "| | before | after | change |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {before} | {after} | {change} |" for name, before, after, change in summary_rows(profile)),
        "",
        "| layer | kind | shape | experts | parameters | MACs | convolution | mixing | routing | attention |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_markdown_row(layer) for layer in multiplying(profile)),
        "",
        *(f"{text}." for text in remainder(profile)),
        "",
        CONVENTION,
    ]
    return "\n".join(lines) + "\n"


def summary_rows(profile: Profile) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change) of the totals, in words."""
    macs, before = profile.macs, profile.macs_before
    pairs: list[tuple[str, float, float]] = [
        ("parameters", profile.parameters_before, profile.parameters),
        ("MACs per image", before, macs.total),
        ("FLOPs per image", 2 * before, 2 * macs.total),
    ]
    rows = [(name, human(a), human(b), percent(a, b)) for name, a, b in pairs]
    parts = (("convolution", before, macs.convolution), ("mixing", 0, macs.mixing), ("routing", 0, macs.routing))
    for name, a, b in (*parts, ("attention", 0, macs.attention)):
        if b and profile.converted:
            rows.append((f"  {name}", human(a), human(b), f"{100 * (b - a) / before:+.2f}%" if before else ""))
    a, b = profile.weight_bytes_before, profile.weight_bytes
    return [*rows, ("weights", human_bytes(a), human_bytes(b), percent(a, b))]


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
