"""A study's tables, verdicts, plot and page, from a record that no ``compare`` made."""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.recipe import ArmCost, ArmRecord, ScoredRun, SearchRun, StudyRecord
from condconv_surgery.reporting import StudyReport
from condconv_surgery.reporting.render.study_table import render_study
from tests.browser import CHROMIUM, act

IMAGES = 400


def runs(better: float, seeds: int = 3, images: int = IMAGES) -> tuple[ScoredRun, ...]:
    """Runs that are right on 70% of the images and ``better`` more; the same random numbers for all arms."""
    found = []
    for seed in range(1, seeds + 1):
        rng = random.Random(seed)
        correct = "".join("1" if rng.random() < 0.7 + better else "0" for _ in range(images))
        found.append(ScoredRun(seed, correct, 0.001, 10, 1000, 9, 0.71, 60.0))
    return tuple(found)


def arm(name: str, better: float, cost: tuple[float, float, float] = (1.0, 1.0, 1.0), seeds: int = 3) -> ArmRecord:
    macs, latency, step = cost
    known = ArmCost(int(2e6 * macs), int(300e6 * macs), 0.1 * step, 0.01 * latency, latency)
    search = tuple(SearchRun(lr, 0.7, 1.0, 9, 60.0) for lr in (0.0003, 0.001, 0.003))
    return ArmRecord(name, runs(better, seeds), search, known, 10, 0.001)


def record(*arms: ArmRecord) -> StudyRecord:
    return StudyRecord("torchvision:mobilenet_v2", (arm("static", 0.0), *arms), environment={"device": "cpu"})


def shown(report: StudyReport) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(render_study(report.record, report.results))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    return str(text)


def test_a_gain_is_said_with_its_interval_and_cost() -> None:
    report = StudyReport(record(arm("condconv:4", 0.05, (1.03, 1.1, 1.3))))
    assert re.fullmatch(
        r"\+\d\.\d ± \d\.\d points at \+3% MACs and 1\.1x latency: convert with condconv:4\.", report.verdict
    )
    assert report.results.winner == "condconv:4"
    table = shown(report)
    assert "baseline" in table
    assert "+3.0%" in table
    assert "1.30x" in table
    assert "over 3 seeds and 400 test images." in " ".join(table.split())


def test_no_gain_keeps_the_static_network() -> None:
    report = StudyReport(record(arm("condconv:4", 0.001)))
    assert report.verdict.startswith("No evidence of a gain: keep the static network (condconv:4: +")
    worse = StudyReport(record(arm("condconv:4", -0.08), arm("odconv:1", -0.1)))
    assert worse.verdict.startswith("No arm is better: keep the static network (condconv:4, the best other arm: -")
    assert (report.results.winner, worse.results.winner) == ("", "")


def test_of_several_gains_the_best_lower_bound_wins_and_is_compared_with_the_next() -> None:
    close = StudyReport(record(arm("condconv:4", 0.06), arm("odconv:1", 0.062)))
    assert close.results.arms[2].difference.mean > close.results.arms[1].difference.mean
    assert "convert with condconv:4. Next is odconv:1" in close.verdict
    assert close.verdict.endswith("is no evidence that one is better.")
    clear = StudyReport(record(arm("condconv:4", 0.2), arm("odconv:1", 0.05)))
    assert "convert with condconv:4. Next is odconv:1" in clear.verdict
    assert clear.verdict.endswith(", is clear.")
    assert "each holds for its own arm, not for all at once" in " ".join(clear.results.notes)


def test_one_seed_covers_images_only() -> None:
    found = StudyReport(StudyRecord("t", (arm("static", 0.0, seeds=1), arm("condconv:4", 0.1, seeds=1))))
    covered = "over 400 test images only: with one seed, what another seed would give is not known"
    assert covered in " ".join(shown(found).split())
    assert "±" not in shown(found).splitlines()[4].split("baseline")[0], "no spread over seeds"


def test_a_rate_at_the_edge_of_the_search_is_mentioned() -> None:
    edge = replace(arm("condconv:4", 0.05), lr=0.003)
    notes = StudyReport(record(edge)).results.notes
    assert "condconv:4: the largest learning rate tried, 0.003, was best; search further." in notes
    assert not any("static: the" in note for note in notes)


def test_a_record_of_another_loop_needs_scores_alone(tmp_path: Path) -> None:
    """No cost, no search, no options: columns and panels without values are left out."""
    own = StudyRecord(
        "endless task",
        tuple(
            ArmRecord(name, tuple(ScoredRun(run.seed, run.correct) for run in runs(better)))
            for name, better in (("plain", 0.0), ("wide", 0.08))
        ),
    )
    report = StudyReport(own)
    assert re.fullmatch(r"\+\d\.\d ± \d\.\d points: convert with wide\.", report.verdict)
    assert "points of top-1 to plain" in report.to_markdown()
    assert shown(report).splitlines()[2].split() == ["arm", "top-1,", "%", "difference"]
    report.write(tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new/folder").iterdir()} == {
        f"study.{kind}" for kind in ("json", "md", "png", "html")
    }
    assert StudyReport.read(tmp_path / "new/folder").record == own
    assert StudyReport.read(tmp_path / "new/folder/study.json").verdict == report.verdict
    with Image.open(tmp_path / "new/folder/study.png") as picture:
        assert picture.width > 600


def test_seeds_that_one_arm_lacks_are_not_compared() -> None:
    report = StudyReport(record(arm("condconv:4", 0.05, seeds=2)))
    assert report.results.arms[1].difference.seeds == 2
    assert "The study is not complete: some runs are missing." in report.results.notes
    other = replace(arm("condconv:4", 0.05), runs=(ScoredRun(77, "1" * IMAGES),))
    with pytest.raises(InputError, match="condconv:4 and static have no seed in common"):
        StudyReport(record(other)).verdict  # noqa: B018
    assert StudyReport(StudyRecord("t", (ArmRecord("static"), arm("b", 0)))).verdict == "The study has no result yet."


def test_a_record_survives_json() -> None:
    before = record(arm("condconv:4", 0.05))
    data = json.loads(json.dumps(before.to_dict(), allow_nan=False))
    assert StudyRecord.from_dict(data) == before
    with pytest.raises(DamagedFileError, match="format 99"):
        StudyRecord.from_dict({**data, "format": 99})
    with pytest.raises(DamagedFileError, match="cannot be read: KeyError"):
        StudyRecord.from_dict({"format": 1})
    json.dumps(StudyReport(before).to_dict(), allow_nan=False)


def test_wrong_records() -> None:
    with pytest.raises(InputError, match="correct is '012'"):
        ScoredRun(0, "012")
    with pytest.raises(InputError, match="two runs with one seed"):
        ArmRecord("a", (ScoredRun(0, "01"), ScoredRun(0, "11")))
    one, other = ArmRecord("a", (ScoredRun(0, "01"),)), ArmRecord("b", (ScoredRun(0, "011"),))
    with pytest.raises(InputError, match="scored on 2 and 3 images"):
        StudyRecord("t", (one, other))
    with pytest.raises(InputError, match="A study of the arms a, a"):
        StudyRecord("t", (one, one))
    with pytest.raises(InputError, match="The baseline 'c' is not an arm"):
        StudyRecord("t", (one,), "c")


def test_no_study_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"study\.json cannot be read: No such file"):
        StudyReport.read(tmp_path)
    (tmp_path / "study.json").write_text("no")
    with pytest.raises(DamagedFileError, match="is not JSON"):
        StudyReport.read(tmp_path)


def test_the_page_is_self_contained_and_escapes_names() -> None:
    page = StudyReport(record(replace(arm("condconv:4", 0.05), name="<script>alert(1)</script>"))).to_html()
    assert "<script>alert" not in page
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(["']?([^"')]*)|@import""", page)
    assert all((a or b).startswith(("data:", "#")) for a, b in loaded)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    report = StudyReport(record(arm("condconv:4", 0.05, (1.03, 1.1, 1.3))))
    script = """
      const button = document.querySelectorAll('#runs thead button')[2];
      button.click();
      return { verdict: document.querySelector('.verdict').textContent,
               winner: document.querySelector('#arms .conditional th').textContent,
               top1: [...document.querySelectorAll('#runs tbody tr')].map(r => Number(r.cells[2].dataset.value)) };"""
    found, console = act(report.to_html(), script, tmp_path)
    assert console == []
    assert (found["verdict"], found["winner"]) == (report.verdict, "condconv:4")
    assert found["top1"] == sorted((run.top1 for arm in report.record.arms for run in arm.runs), reverse=True)
