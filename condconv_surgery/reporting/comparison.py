"""``Comparison``: the reports of several models in one table; and the page of a report or comparison as a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condconv_surgery.models.artifact.atomic_write import replacing
from condconv_surgery.reporting.full_report import Report
from condconv_surgery.reporting.render import comparison_table
from condconv_surgery.reporting.render.html_page import comparison_page
from condconv_surgery.reporting.render.terminal import make_console, render_comparison


@dataclass(frozen=True)
class Comparison:
    """Reports of several models in the order in which they were given."""

    reports: tuple[Report, ...]

    def to_dict(self) -> dict[str, Any]:
        """``models``: the dictionary of each report."""
        return {"models": [report.to_dict() for report in self.reports]}

    def to_csv(self) -> str:
        return comparison_table.to_csv(self.reports)

    def to_markdown(self) -> str:
        return comparison_table.to_markdown(self.reports)

    def to_html(self) -> str:
        """One self-contained page with the table and the plots."""
        return comparison_page(self.reports)

    def print(self, width: int | None = None) -> None:
        console = make_console(width)
        console.print(render_comparison(self.reports, console.width))

    def write_plots(self, folder: str | Path) -> list[Path]:
        """Write accuracy against MACs and against parameters as PNG and SVG; return the files."""
        from condconv_surgery.reporting.render.matplotlib_figures import write_figures
        from condconv_surgery.reporting.render.plots import accuracy_against_cost

        return write_figures(Path(folder), {"comparison": accuracy_against_cost(self.reports)})


def write_page(report: Report | Comparison, path: str | Path) -> None:
    """Write ``report.to_html()`` to ``path``, atomically. Raises ``InputError`` if it cannot be written."""
    page = report.to_html()
    with replacing(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")
