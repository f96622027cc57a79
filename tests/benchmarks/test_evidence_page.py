"""The page of evidence says what the recorded studies say."""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies.evidence_page import PAGE, STUDIES, Evidence, figure, page
from condconv_surgery.recipe.study_record import ArmRecord, ScoredRun, StudyRecord
from condconv_surgery.reporting import StudyReport


def test_the_page_is_that_of_the_records() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_table_has_the_accuracies_and_the_figure_the_arms_of_the_records() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page().splitlines() if line.startswith("| ")]
    top1: dict[str, dict[str, float]] = {}
    name = ""
    for row in lines[1:]:
        name = row[0] or name
        top1.setdefault(name, {})[row[1]] = float(row[5])
    labels = [label.get_text().replace("\n", " ") for label in figure().axes[0].get_yticklabels()]
    for study in STUDIES:
        scored = [arm for arm in study.record.arms if arm.runs]
        assert set(top1[study.name]) == {arm.name for arm in scored}
        for arm in scored:
            right = sum(run.correct.count("1") for run in arm.runs) / sum(len(run.correct) for run in arm.runs)
            assert abs(top1[study.name][arm.name] - 100 * right) <= 0.05
        assert [f"{study.name}: {arm.name}" for arm in study.compared()] == labels[: len(study.compared())]
        del labels[: len(study.compared())]
    assert not labels


def test_a_study_with_equal_time_fills_that_column(tmp_path: Path) -> None:
    runs = {"static": "0011" * 50, "condconv:4": "0111" * 50}
    arms = tuple(ArmRecord(name, tuple(ScoredRun(seed, text) for seed in (1, 2, 3))) for name, text in runs.items())
    for budget, columns in (("steps", ["+25.0", ""]), ("time", ["", "+25.0"])):
        StudyReport(StudyRecord("a task", arms, settings={"budget": budget})).write(tmp_path / budget)
        static, converted = page((Evidence(str(tmp_path / budget), "a task"),)).split("|---:|")[-1].splitlines()[1:3]
        assert [cell.strip()[:5] for cell in converted.split("|")[7:9]] == columns
        assert [bool(cell.strip()) for cell in static.split("|")[7:9]] == [bool(cell) for cell in columns]
