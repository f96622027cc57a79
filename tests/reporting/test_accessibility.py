"""Pages by axe-core (npm install --no-save axe-core) and at the width of a phone, in light and in dark."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from condconv_surgery import report
from condconv_surgery.reporting import Comparison, Report, StudyReport
from tests.browser import CHROMIUM, devtools, value_of, visit
from tests.images import write_images
from tests.measured_report import network
from tests.reporting.test_study_report import arm, record

AXE = Path(os.environ.get("AXE_CORE", Path(__file__).parents[2] / "node_modules/axe-core/axe.min.js"))

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def pages(measured: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    plain = report(network(), data=write_images(folder / "images", classes=3, each=6))
    texts = {
        "converted": measured.to_html(),
        "unconverted": plain.to_html(),
        "comparison": Comparison((plain, measured)).to_html(),
        "study": StudyReport(record(arm("condconv:4", 0.05))).to_html(),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


VIOLATIONS = """
  (async () => {
    for (const closed of document.querySelectorAll('details')) closed.open = true;
    const found = await axe.run(document, { resultTypes: ['violations'] });
    const said = v => v.id + ': ' + v.nodes.slice(0, 3).map(n => n.html.slice(0, 120)).join(' | ');
    return { rules: found.passes.length, violations: found.violations.map(said) };
  })()"""


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core: npm install --no-save axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_violation(pages: dict[str, Path], width: int, scheme: str, tmp_path: Path) -> None:
    with devtools(tmp_path) as call:
        for name, file in pages.items():
            session = visit(call, file, width, scheme)
            value_of(call, session, AXE.read_text(encoding="utf-8") + ";0")
            found = value_of(call, session, VIOLATIONS)
            assert found["violations"] == [], name
            assert found["rules"] > 15, "axe has run"


WIDTHS = """({
  page: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  totals: [...document.querySelectorAll('.totals')].map(t => t.parentElement.scrollWidth - t.parentElement.clientWidth),
  columns: [...document.querySelectorAll('.totals thead th')].map(e => e.getBoundingClientRect().right),
  tiles: [...document.querySelectorAll('.tile b')].map(e => e.scrollWidth - e.clientWidth) })"""


def test_the_change_column_fits_a_phone(pages: dict[str, Path], tmp_path: Path) -> None:
    with devtools(tmp_path) as call:
        for name, file in pages.items():
            found = value_of(call, visit(call, file, 390), WIDTHS)
            assert found["page"] == 0, name
            assert set(found["totals"]) <= {0}, name
            assert all(right <= 390 for right in found["columns"])
            assert set(found["tiles"]) <= {0}, name
        assert found["columns"] == [], "of a study"


LISTS = """({
  beyond: [...document.querySelectorAll('.stacked')].map(
    t => t.parentElement.scrollWidth - t.parentElement.clientWidth),
  labels: [...document.querySelectorAll('.stacked tbody tr')].map(
    r => [...r.querySelectorAll('td')].map(td => getComputedStyle(td, '::before').content)),
  headers: [...document.querySelectorAll('.stacked thead th:not(:first-child)')].map(e => '"' + e.textContent + '"'),
  plots: [...document.querySelectorAll('.plots > div')].map(e => e.scrollWidth - e.clientWidth) })"""


@pytest.mark.parametrize("kind", ["comparison", "study"])
def test_arms_and_models_are_lists_on_a_phone(pages: dict[str, Path], tmp_path: Path, kind: str) -> None:
    with devtools(tmp_path) as call:
        found = value_of(call, visit(call, pages[kind], 390), LISTS)
        assert found["beyond"] == [0]
        assert found["labels"] == [found["headers"]] * 2
        assert set(found["plots"]) == {0}
        wide = value_of(call, visit(call, pages[kind], 1280), LISTS)
        assert {label for row in wide["labels"] for label in row} == {"none"}, "a table, whose header names the columns"
