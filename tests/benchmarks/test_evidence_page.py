"""The page of evidence says what the recorded studies say."""

from __future__ import annotations

from benchmarks.studies.evidence_page import PAGE, STUDIES, figure, page


def test_the_page_is_that_of_the_records() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_table_has_the_accuracies_and_the_figure_the_arms_of_the_records() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page().splitlines() if line.startswith("| ")]
    top1 = {row[1]: float(row[5]) for row in rows[1:]}
    labels = [label.get_text() for label in figure().axes[0].get_yticklabels()]
    for study in STUDIES:
        record = study.record
        for arm in (arm for arm in record.arms if arm.runs):
            right = sum(run.correct.count("1") for run in arm.runs) / sum(len(run.correct) for run in arm.runs)
            assert abs(top1[arm.name] - 100 * right) <= 0.05
        assert [f"{study.name}: {arm.name}" for arm in study.compared()] == labels[: len(study.compared())]
        del labels[: len(study.compared())]
