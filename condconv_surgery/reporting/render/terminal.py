"""A report in a terminal of 80 or more columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from condconv_surgery.errors import counted
from condconv_surgery.reporting.images.attention_statistics import attention_line
from condconv_surgery.reporting.images.network_routing import Routing
from condconv_surgery.reporting.measure.cost_table import Layer, Macs, Profile
from condconv_surgery.reporting.measure.expert_similarity import Experts
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.measure.memory_and_latency import Cost
from condconv_surgery.reporting.render import table_rows
from condconv_surgery.reporting.render.answers import caveats, comparison_answer
from condconv_surgery.reporting.render.comparison_table import HEADERS, measured_columns, rows_of
from condconv_surgery.reporting.render.number_format import human

WIDTH = 80
"""Columns when the output is not a terminal."""


def render_profile(profile: Profile, title: str, width: int = WIDTH, cost: Cost | None = None) -> RenderableType:
    """Totals, memory and latency, layers, what is not listed and the counting convention, for ``width`` columns."""
    headers, totals = table_rows.totals(profile, cost)
    notes = [
        table_rows.convention(profile),
        table_rows.other_counters(profile),
        table_rows.latency_line(cost, profile.converted > 0) if cost else "",
    ]
    return Group(
        Text(title, style="bold"),
        Text(f"input {profile.input}", style="dim"),
        Text(""),
        simple_table([("", False), *((header, True) for header in headers)], totals),
        Text(""),
        _layers(profile, width),
        Text(""),
        *(Text(f"Not listed: {text}.", style="dim") for text in table_rows.remainder(profile)),
        *(Text(note, style="dim") for note in notes if note),
    )


def render_routing(routing: Routing, experts: Sequence[Experts] = (), width: int = WIDTH) -> RenderableType:
    """One line per layer: how many experts it uses, how much its gates vary, the verdict; static ones in one line."""
    cosines = {row.name: f"{row.cosine:.2f}" for row in experts}
    numeric = [(name, True) for name in ("used", "vary", "kernels", "class", "cos")]
    headers = [("layer", False), *numeric, ("verdict", False)]
    varying, static = table_rows.varying_and_static(routing)
    verdict = max([len(layer.advice) for layer in varying], default=0)
    name = max(12, width - verdict - 32)
    rows: list[list[str | Text]] = [
        [
            shortened(layer.name, name),
            f"{layer.used:.1f}/{layer.experts}",
            f"{layer.variation:.3f}",
            "" if layer.kernels is None else f"{layer.kernels:.3f}",
            f"{layer.between:.0%}",
            cosines.get(layer.name, ""),
            Text(layer.advice, style="green"),
        ]
        for layer in varying
    ]
    key = (
        "used: effective number of experts. vary: mean distance of an image's gates from the mean gates. "
        "kernels: difference of an image's mixed kernel from the mean kernel, relative to it. "
        "class: share of the gates' variance that the class explains. "
        "cos: mean cosine between experts."
    )
    parts: list[RenderableType] = [""]
    if rows:
        parts += [simple_table(headers, rows, tight=True), Text(key, style="dim")]
    if static:
        parts.append(Text(table_rows.static_line(static), style="dim"))
    if routing.attention:
        parts.append(Text(attention_line(routing.attention)))
    return Group(*parts, Text(routing.verdict, style="bold"))


def render_experts(experts: Sequence[Experts]) -> RenderableType:
    """One sentence on how different the kernels are: mean over the layers, and the layer that moved most."""
    if not experts:
        return Group()
    cosine = sum(row.cosine for row in experts) / len(experts)
    text = f"Experts: mean cosine {cosine:.3f} over {counted(len(experts), 'layer')} (1: equal kernels)"
    moved = [row for row in experts if row.moved is not None]
    if moved:
        most = max(moved, key=lambda row: row.moved or 0.0)
        mean = sum(row.moved or 0.0 for row in moved) / len(moved)
        text += f"; {mean:.1%} from the original weight on average, most in {most.name}: {most.moved:.1%}"
    return Text(text + ".")


def render_comparison(models: Sequence[Measurements], width: int = WIDTH) -> RenderableType:
    """The answer, and one line per model, without columns in which nothing was measured; what limits it."""
    rows = rows_of(models)
    columns = measured_columns(rows)
    widths = [max(len(HEADERS[i]), *(len(row[i]) for row in rows)) for i in columns[1:]]
    tight = max(len(row[0]) for row in rows) + sum(widths) + 2 * len(widths) > width
    first = max(16, width - sum(widths) - (1 if tight else 2) * len(widths))
    cells = [[shortened(row[0], first), *(row[i] for i in columns[1:])] for row in rows]
    return Group(
        simple_table([(HEADERS[i], i != 0) for i in columns], cells, tight),
        "",
        *(Text(note, style="dim") for note in caveats(models)),
        Text(comparison_answer(models), style="bold"),
    )


class Printable(ABC):
    """Something measured that is read as tables and answered in a sentence."""

    @abstractmethod
    def _tables(self, width: int) -> RenderableType:
        """What is printed, for ``width`` columns."""

    @abstractmethod
    def _answer(self) -> str:
        """What it says, in one sentence."""

    def print(self, width: int | None = None) -> None:
        """Print tables on stdout, as wide as the terminal or ``width`` columns."""
        console = make_console(width)
        console.print(self._tables(console.width))

    def __str__(self) -> str:
        """What ``print`` prints, in 80 columns without colours."""
        text = StringIO()
        console = Console(width=WIDTH, highlight=False, file=text, color_system=None, force_terminal=False)
        console.print(self._tables(WIDTH))
        return text.getvalue().rstrip()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._answer()}>"


def make_console(width: int | None = None) -> Console:
    """A console on stdout, as wide as the terminal; 80 columns when piped."""
    console = Console(width=width, highlight=False)
    return console if width is not None or console.is_terminal else Console(width=WIDTH, highlight=False)


def simple_table(
    headers: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str | Text]], tight: bool = False
) -> Table:
    """A table without vertical lines. headers: (text, whether the column is numeric).

    tight: one space between columns instead of two.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0 if tight else 1, 0, 0), pad_edge=False, show_edge=False)
    for header, numeric in headers:
        table.add_column(header, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def shortened(name: str, width: int) -> str:
    """A layer name cut at its start: names of layers differ at their end.

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
    layers = table_rows.multiplying(profile)
    rows = [_layer_row(layer, macs) for layer in layers]
    widths = [max([len(header), *(len(row[i]) for row in rows)]) for i, (header, _) in enumerate(columns)]
    tight = max(len(layer.name) for layer in layers) + sum(widths) + 2 * len(widths) > width if layers else False
    name_width = max(12, width - sum(widths) - len(widths) * (1 if tight else 2))
    named: list[list[str | Text]] = [
        [Text(shortened(layer.name, name_width), style="bold cyan" if layer.conditional else ""), *row]
        for layer, row in zip(layers, rows, strict=True)
    ]
    return simple_table([("layer", False), *columns], named, tight)


def _layer_row(layer: Layer, shown: Macs) -> list[str]:
    """The cells after the name; of the added MACs only the parts that the model has."""
    macs = layer.macs
    pairs = ((macs.mixing, shown.mixing), (macs.routing, shown.routing), (macs.attention, shown.attention))
    added = [compact(own) if own else "" for own, any_layer_has in pairs if any_layer_has]
    kind = layer.kind if len(layer.kind) <= 11 else layer.kind[:10] + "…"
    experts = str(layer.experts) if layer.conditional else ""
    return [kind, experts, layer.geometry, compact(layer.parameters), compact(macs.convolution), *added]
