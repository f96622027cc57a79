"""A report on a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from condconv_surgery.reporting.model_profile import CONVENTION, Layer, Macs, Profile
from condconv_surgery.reporting.numbers import human
from condconv_surgery.reporting.tables import multiplying, remainder, summary_rows

WIDTH = 80
"""Columns of a terminal that is not told to be wider."""


def render_profile(profile: Profile, title: str, width: int = WIDTH) -> RenderableType:
    """The totals, the layers, what is not listed, and the convention, for ``width`` columns."""
    return Group(
        Text(title, style="bold"),
        Text(f"input {profile.input}", style="dim"),
        Text(""),
        simple_table([("", False), ("before", True), ("after", True), ("change", True)], summary_rows(profile)),
        Text(""),
        _layers(profile, width),
        Text(""),
        *(Text(f"Not listed: {text}.", style="dim") for text in remainder(profile)),
        Text(CONVENTION, style="dim"),
    )


def make_console(width: int | None = None) -> Console:
    """A console on stdout, as wide as the terminal; 80 columns in a pipe."""
    console = Console(width=width, highlight=False)
    return console if width is not None or console.is_terminal else Console(width=WIDTH, highlight=False)


def simple_table(headers: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str | Text]]) -> Table:
    """A table without vertical lines; a header's flag says whether its column is of numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for header, numeric in headers:
        table.add_column(header, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def shortened(name: str, width: int) -> str:
    """A layer name whose end is kept: that is what tells layers apart.

    >>> shortened("features.denseblock4.denselayer16.conv2", 20)
    '….denselayer16.conv2'
    """
    return name if len(name) <= width else "…" + name[-(width - 1) :]


def compact(count: float) -> str:
    """``human`` without the space, for narrow columns."""
    return human(count).replace(" ", "")


def _layers(profile: Profile, width: int) -> Table:
    macs = profile.macs
    columns = [("kind", False), ("E", True), ("shape", False), ("params", True), ("conv", True)]
    columns += [("mix", True)] if macs.mixing else []
    columns += [("route", True)] if macs.routing else []
    columns += [("attn", True)] if macs.attention else []
    layers = multiplying(profile)
    rows = [_layer_row(layer, macs) for layer in layers]
    widths = [max([len(header), *(len(row[i]) for row in rows)]) for i, (header, _) in enumerate(columns)]
    name_width = max(12, width - sum(widths) - len(widths))
    named: list[list[str | Text]] = [
        [Text(shortened(layer.name, name_width), style="bold cyan" if layer.conditional else ""), *row]
        for layer, row in zip(layers, rows, strict=True)
    ]
    return simple_table([("layer", False), *columns], named)


def _layer_row(layer: Layer, shown: Macs) -> list[str]:
    """Everything but the name; of the added MACs only the kinds that the model has."""
    macs = layer.macs
    pairs = ((macs.mixing, shown.mixing), (macs.routing, shown.routing), (macs.attention, shown.attention))
    added = [compact(own) if own else "" for own, any_layer_has in pairs if any_layer_has]
    kind = layer.kind if len(layer.kind) <= 11 else layer.kind[:10] + "…"
    experts = str(layer.experts) if layer.conditional else ""
    return [kind, experts, layer.geometry, compact(layer.parameters), compact(macs.convolution), *added]
