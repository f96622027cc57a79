"""The study of the endless task, for a few steps: what its runs share, what it records, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import endless_runs
from benchmarks.studies.endless_runs import Study
from benchmarks.studies.endless_study import main
from condconv_surgery.reporting import StudyReport
from examples.endless_emoji import read_emoji
from tests.examples.emoji_packages import write_packages

ARMS = ["static", "condconv:4", "condconv:4, noise"]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(endless_runs, "TEST_BATCHES", 2)
    packages = [str(path) for path in write_packages(tmp_path)]
    sizes = ["--classes", "5", "--steps", "2", "--base-steps", "2", "--seeds", "1", "2"]
    return ["--packages", *packages, "--out", str(tmp_path / "out"), *sizes]


def test_a_study_goes_on_where_it_was_and_is_collected(arguments: list[str], tmp_path: Path) -> None:
    out, threads = tmp_path / "out", torch.get_num_threads()
    try:
        with pytest.raises(SystemExit, match="static: the search has 0 of 3 rates"):
            main(["run", *arguments, "--arms", *ARMS])
        main(["search", *arguments, "--arms", *ARMS])
        main(["run", *arguments, "--arms", *ARMS[:2]])
        first = {file.name: file.read_bytes() for file in out.glob("[!s]*.json")}
        first |= {file.name: file.read_bytes() for file in out.glob("static-*.json")}
        main(["run", *arguments, "--arms", *ARMS])
        main(["collect", *arguments])
    finally:
        torch.set_num_threads(threads)
    assert len(first) == 4
    assert all((out / name).read_bytes() == data for name, data in first.items())
    record = StudyReport.read(out).record
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in record.arms] == [(name, [1, 2]) for name in ARMS]
    assert record.baseline == "static"
    for arm in record.arms:
        assert [run.lr for run in arm.search] == list(endless_runs.RATES)
        assert arm.lr == max(arm.search, key=lambda run: run.val_top1).lr
        assert arm.cost.parameters == json.loads(first["static-1.json"])["parameters"] or arm.name != "static"
        assert all(len(run.correct) == 2 * endless_runs.TEST_SIZE for run in arm.runs)


def test_arms_share_their_base_and_their_images(arguments: list[str], tmp_path: Path) -> None:
    study = Study(read_emoji(arguments[1:3], 5), tmp_path, steps=2, base_steps=2)
    plain, converted = study.base(1), study.converted(study.arms["condconv:4"], 1)
    x = study.task.batch(4, "any").images
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    for one, other in zip(study.images(1, 2), study.images(1, 4), strict=False):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    drawn = study.task.batch(64, "train", 1, 0)
    (stored, *_) = study.images(1, 1)
    assert torch.equal(stored.labels, drawn.labels)
    off = (stored.images - drawn.images).abs() * 0.3
    inside = ((drawn.images * 0.3 + 0.5) > 0) & ((drawn.images * 0.3 + 0.5) < 1)
    assert off[inside].max() <= 0.5 / 255 + 1e-6  # rounded to 8 bits
    assert not torch.equal(next(study.images(2, 1)).images, stored.images)
