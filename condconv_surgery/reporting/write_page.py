"""``write_page``: the HTML page of a report or a comparison as a file."""

from __future__ import annotations

from pathlib import Path

from condconv_surgery.models.artifact.atomic_write import replacing
from condconv_surgery.reporting.comparison import Comparison
from condconv_surgery.reporting.full_report import Report


def write_page(report: Report | Comparison, path: str | Path) -> None:
    """Write ``report.to_html()`` to ``path``, atomically. Raises ``InputError`` if it cannot be written."""
    page = report.to_html()
    with replacing(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")
