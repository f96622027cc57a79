"""``Comparison``: the reports of several models in one table; and the page of a report or comparison as a file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import RenderableType

from condconv_surgery.models.artifact.atomic_write import replacing
from condconv_surgery.reporting.full_report import Report
from condconv_surgery.reporting.images.paired_models import differences_to_first
from condconv_surgery.reporting.render import comparison_table
from condconv_surgery.reporting.render.answers import comparison_answer
from condconv_surgery.reporting.render.html_page import comparison_page
from condconv_surgery.reporting.render.terminal import Printable, render_comparison
from condconv_surgery.reporting.study.paired_difference import Difference


@dataclass(frozen=True, repr=False)
class Comparison(Printable):
    """Reports of several models in the order in which they were given."""

    reports: tuple[Report, ...]

    def to_dict(self) -> dict[str, Any]:
        """``answer``, ``differences`` to the first model, and ``models``: the dictionary of each report."""
        differences = [difference and difference.to_dict() for difference in self.differences]
        models = [report.to_dict() for report in self.reports]
        return {"answer": comparison_answer(self.reports), "differences": differences, "models": models}

    @cached_property
    def differences(self) -> list[Difference | None]:
        """Of each model to the first, over the same images, paired; ``None`` where the images are not the same."""
        return differences_to_first(self.reports)

    def to_csv(self) -> str:
        return comparison_table.to_csv(self.reports)

    def to_markdown(self) -> str:
        return comparison_table.to_markdown(self.reports)

    def to_html(self) -> str:
        """One self-contained page with the table and the plots."""
        return comparison_page(self.reports)

    def _tables(self, width: int) -> RenderableType:
        return render_comparison(self.reports, width)

    def _answer(self) -> str:
        return comparison_answer(self.reports)

    def write_plots(self, folder: str | Path) -> list[Path]:
        """Write accuracy against MACs and against parameters, under the answer, as PNG and SVG; return the files."""
        from condconv_surgery.reporting.render.matplotlib_figures import write_figures
        from condconv_surgery.reporting.render.plots import accuracy_against_cost

        figure = accuracy_against_cost(self.reports)
        figure.suptitle(fill(comparison_answer(self.reports), 95), fontsize=10.5)
        return write_figures(Path(folder), {"comparison": figure})


def write_page(report: Report | Comparison, path: str | Path) -> None:
    """Write ``report.to_html()`` to ``path``, atomically. Raises ``InputError`` if it cannot be written."""
    page = report.to_html()
    with replacing(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")
