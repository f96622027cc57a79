"""Several reports side by side."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condconv_surgery.reporting.full_report import Report
from condconv_surgery.reporting.render.html_page import comparison_page
from condconv_surgery.reporting.render.number_format import human, human_bytes
from condconv_surgery.reporting.render.tables import measured_columns
from condconv_surgery.reporting.render.terminal import make_console, render_comparison

HEADERS = ("model", "converted", "parameters", "MACs", "weights", "latency", "top-1")


@dataclass(frozen=True)
class Comparison:
    """Reports of several models in the order in which they were asked for."""

    reports: tuple[Report, ...]

    def rows(self) -> list[list[str]]:
        """The cells under ``HEADERS``, in words; a dash where nothing was measured."""
        return [_row(report) for report in self.reports]

    def to_dict(self) -> dict[str, Any]:
        """``models``: what each report says of itself."""
        return {"models": [report.to_dict() for report in self.reports]}

    def to_csv(self) -> str:
        """One line a model, plain numbers; empty where nothing was measured."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["model", "parameters", "macs", "weight_bytes", "latency_seconds", "accuracy"])
        for report in self.reports:
            profile, latency = report.profile, report.latency
            numbers = [profile.parameters, profile.macs.total, profile.weight_bytes]
            writer.writerow([report.title, *numbers, latency.median if latency else "", _or_empty(report.accuracy)])
        return out.getvalue()

    def to_markdown(self) -> str:
        """One table, without columns in which nothing was measured."""
        kept = measured_columns(self.rows())
        lines = [[row[i] for i in kept] for row in (HEADERS, *self.rows())]
        head, *body = ("| " + " | ".join(line) + " |" for line in lines)
        return "\n".join([head, "|---|" + "---:|" * (len(kept) - 1), *body]) + "\n"

    def to_html(self) -> str:
        """One self-contained page with the table and the plots."""
        return comparison_page(self.reports, HEADERS, self.rows(), [_values(report) for report in self.reports])

    def print(self, width: int | None = None) -> None:
        """A table on stdout."""
        console = make_console(width)
        console.print(render_comparison(HEADERS, self.rows(), console.width))

    def write_plots(self, folder: str | Path) -> list[Path]:
        """Accuracy against MACs and against parameters, as PNG and SVG; returns the files."""
        from condconv_surgery.reporting.render import figures as drawing
        from condconv_surgery.reporting.render import plots

        return drawing.write(Path(folder), {"comparison": plots.accuracy_against_cost(self.reports)})


def _row(report: Report) -> list[str]:
    profile, latency = report.profile, report.latency
    return [
        report.title,
        f"{profile.converted} layers" if profile.converted else "-",
        human(profile.parameters),
        human(profile.macs.total),
        human_bytes(profile.weight_bytes),
        f"{latency.median * 1e3:.1f} ms" if latency else "-",
        "-" if report.accuracy is None else f"{report.accuracy:.1%}",
    ]


def _values(report: Report) -> list[float]:
    """The numbers behind ``_row``; -1 for what was not measured."""
    profile, latency = report.profile, report.latency
    accuracy = -1.0 if report.accuracy is None else report.accuracy
    sizes = [profile.converted, profile.parameters, profile.macs.total, profile.weight_bytes]
    return [0, *sizes, latency.median if latency else -1.0, accuracy]


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else value
