"""A study as one self-contained HTML page, in the style of a report."""

from __future__ import annotations

from condconv_surgery.recipe.study_record import StudyRecord
from condconv_surgery.reporting.measure.cost_table import CONVENTION
from condconv_surgery.reporting.render.html_page import templates
from condconv_surgery.reporting.render.matplotlib_figures import to_svg
from condconv_surgery.reporting.render.study_plot import study_panels
from condconv_surgery.reporting.render.study_table import HEADERS, columns_shown, key_of, study_rows
from condconv_surgery.reporting.study.study_results import StudyResults


def study_page(record: StudyRecord, results: StudyResults) -> str:
    """Verdict, table, plot, what was done, every run."""
    rows = study_rows(record, results)
    shown = columns_shown(rows)
    return (
        templates()
        .get_template("study.html.j2")
        .render(
            title=record.title,
            record=record,
            results=results,
            headers=[HEADERS[i] for i in shown],
            rows=[[row[i] for i in shown] for row in rows],
            key=key_of(record),
            plots=_plots(record, results) if results.arms else [],
            convention=CONVENTION,
        )
    )


def _plots(record: StudyRecord, results: StudyResults) -> list[tuple[str, str]]:
    """What each panel shows, and its SVG."""
    panels = study_panels(record, results).items()
    return [(shows, to_svg(figure, f"study{i}")) for i, (shows, figure) in enumerate(panels)]
