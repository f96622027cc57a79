"""Studies of tiny networks: what is equal for the arms, what is selected on what, resuming, verdicts."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import condconv_surgery as cs
from condconv_surgery.data.three_parts import find_three_parts
from condconv_surgery.errors import DamagedFileError, InputError, TrainingError
from condconv_surgery.models.artifact.save_load import load
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import (
    ArmRecord,
    CondConv,
    InputSpec,
    Recipe,
    ScoredRun,
    StudyRecord,
    TrainingOptions,
    attach_recipe,
    recipe_of,
)
from condconv_surgery.reporting import StudyReport
from condconv_surgery.studies import compare, run_study, with_costs
from condconv_surgery.studies.image_scores import correct_images
from condconv_surgery.studies.step_times import epochs_in_equal_time
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.learner import Learner
from condconv_surgery.training.monitor.callback import Callback, StepView
from tests import small_study
from tests.images import write_images
from tests.small_networks import small_net
from tests.small_study import study_options, without_times
from tests.training.forked import forked

ARMS = ["static", "condconv:2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data", each=12)  # 24 to train on, 6 and 6


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Short measurements; pictures and pages in one test only."""
    monkeypatch.setattr("condconv_surgery.studies.arm_costs.SECONDS", 0.1)
    monkeypatch.setattr("condconv_surgery.studies.step_times.MOST", 2)
    if request.node.name != "test_a_study_records_every_run_and_writes_its_files":
        monkeypatch.setattr("condconv_surgery.training.run.draw_curves", lambda rows, path: None)
        monkeypatch.setattr(StudyReport, "write", lambda self, folder: None)


def study(data: Path, output: Path, arms: list[str] = ARMS, **how: Any) -> StudyReport:
    options = study_options(**how.pop("options", {}))
    how = {"seeds": 2, "rates": 1, **how}
    return compare(small_net(norm=False, dropout=0.0), arms, options, data=data, output=output, **how)


def test_a_study_records_every_run_and_writes_its_files(data: Path, tmp_path: Path) -> None:
    report = study(data, tmp_path / "study", rates=2)
    static, converted = report.record.arms
    assert (static.name, converted.name, report.record.baseline) == ("static", "condconv:2", "static")
    for arm in (static, converted):
        assert [run.lr for run in arm.search] == [0.01, 0.03]
        assert arm.lr == max(arm.search, key=lambda run: (run.val_top1, -run.val_loss)).lr
        assert [run.seed for run in arm.runs] == [1, 2], "the search has seed 0"
        assert {(run.lr, run.epochs, run.steps, len(run.correct)) for run in arm.runs} == {(arm.lr, 2, 6, 6)}
    assert static.cost.parameters == sum(p.numel() for p in small_net(classes=3).parameters())
    assert static.cost.latency_ratio == 1.0
    assert converted.cost.macs > static.cost.macs > 0
    assert min(arm.cost.step_seconds for arm in report.record.arms) > 0
    files = {path.name for path in (tmp_path / "study").iterdir()}
    assert files == {"study.json", "study.md", "study.png", "study.html", "data.json", "runs"}
    kept = {path.name for path in (tmp_path / f"study/runs/condconv-2-{converted.lr:g}-1").iterdir()}
    assert kept == {"best.safetensors", "metrics.jsonl", "recipe.toml", "curves.png"}
    assert StudyReport.read(tmp_path / "study").record == report.record
    sentences = " ".join(report.record.protocol)
    assert "24 training, 6 validation and 6 test images" in sentences
    assert "2 tried for each arm (0.01, 0.03 unless" in sentences


def test_scores_are_of_the_best_epoch_on_the_test_part(data: Path, tmp_path: Path) -> None:
    report = study(data, tmp_path / "study", seeds=1, options={"schedule": {"epochs": 4}})
    (run,) = report.record.arm("condconv:2").runs
    folder = tmp_path / "study/runs/condconv-2-0.01-1"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["val_top1"], -row["val_loss"]))
    assert (run.best_epoch, run.val_top1) == (best["epoch"], best["val_top1"])
    parts = find_three_parts(TrainingOptions().updated({"data": {"folder": str(data)}}).data, 0)
    model = load(folder / "best.safetensors", model=small_net(norm=False, dropout=0.0))
    options = TrainingOptions().updated(study_options())
    assert correct_images(model, parts.test, options, World()) == run.correct
    right = []
    for index, label in enumerate(parts.test.labels):  # one image at a time, by hand
        with parts.test.open(index) as image, torch.no_grad():
            logits = model(EvaluationTransform(recipe_of(model).input)(image.convert("RGB"))[None])
        right.append("1" if int(logits.argmax()) == label else "0")
    assert "".join(right) == run.correct


def test_all_arms_see_the_same_images_in_the_same_order(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, int], list[float]] = {}
    step = Learner.step

    def recorded(self: Learner, batches: Any, *args: int) -> Any:
        if Path(self.options.output).parent.name == "runs":
            key = (Path(self.options.output).name, self.options.seed)
            seen.setdefault(key, []).extend(float(batch.images.double().sum()) for batch in batches)
        return step(self, batches, *args)

    monkeypatch.setattr(Learner, "step", recorded)
    study(data, tmp_path / "study")
    one, two = (seen[f"static-0.01-{seed}", seed] for seed in (1, 2))
    assert one == seen["condconv-2-0.01-1", 1]
    assert two == seen["condconv-2-0.01-2", 2]
    assert len(one) == 6
    assert sorted(one) != sorted(two)


def test_the_given_model_is_not_changed(data: Path, tmp_path: Path) -> None:
    model = small_net(norm=False, dropout=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare(model, ARMS, study_options(), data=data, output=tmp_path / "study", seeds=1, rates=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_planted_gain_is_found(tmp_path: Path) -> None:
    """The static network may not learn; the converted one may."""
    data = write_images(tmp_path / "data", each=60)
    arms = ["static,optimizer.lr=1e-6", "condconv:2"]
    report = study(data, tmp_path / "study", arms, options={"schedule": {"epochs": 6}, "optimizer": {"lr": 0.03}})
    assert report.results.winner == "condconv:2"
    assert "convert with condconv:2" in report.verdict
    assert report.verdict.startswith("+")
    assert report.results.arms[1].difference.low > 0


def test_without_a_gain_the_static_network_is_kept(data: Path, tmp_path: Path) -> None:
    report = study(data, tmp_path / "study", ["static", "static,name=again"])
    assert report.results.winner == ""
    assert report.results.arms[1].difference.mean == 0.0
    assert report.verdict.startswith("No evidence of a gain: keep the static network")


def killed_study(arguments: list[str]) -> int:
    process = forked(small_study.main, arguments, output=Path(arguments[0]).with_suffix(".txt"))
    process.join(120)
    return process.exitcode or 0


def test_a_study_that_was_killed_ends_with_the_same_record(data: Path, tmp_path: Path) -> None:
    given = {"arms": ARMS, "options": study_options(), "data": str(data), "seeds": 2, "rates": 2}
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    for file in (whole, killed):
        file.write_text(json.dumps({**given, "output": str(file.with_suffix(""))}))
    assert killed_study([str(whole)]) == 0
    measuring = 2 * (2 + 5)  # steps before the first run
    for kill in (f"kill:{measuring - 3}", f"kill:{measuring + 4}", "kill:record:1", "kill:19", "kill:record:0"):
        assert killed_study([str(killed), kill]) == -signal.SIGKILL, kill
    assert killed_study([str(killed)]) == 0
    one, other = (json.loads((file.with_suffix("") / "study.json").read_text()) for file in (whole, killed))
    assert without_times(one) == without_times(other)
    assert len(one["record"]["arms"][0]["runs"]) == 2


class StopAt(Callback):
    """Sends a signal to this process in the middle of a step, once."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, view: StepView) -> None:
        if view.step == self.at:
            self.at = -1
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_saves_the_study_and_more_seeds_may_be_added(data: Path, tmp_path: Path) -> None:
    stop = StopAt(3)
    stopped = study(data, tmp_path / "study", seeds=1, display=lambda: stop)
    assert not stopped.complete
    assert stopped.verdict == "The study has no result yet."
    assert study(data, tmp_path / "study", seeds=1).complete
    more = study(data, tmp_path / "study", seeds=2)
    assert without_times(more.record.to_dict()) == without_times(
        study(data, tmp_path / "other", seeds=2).record.to_dict()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"optimizer": {"lr": 0.02}}}, "training.optimizer.lr was 0.01 and is 0.02"),
        ({"options": {"schedule": {"epochs": 3}}}, "training.schedule.epochs was 2 and is 3"),
        ({"arms": ["static", "condconv:4"]}, r"arms was .*condconv:2'\] and is .*condconv:4'\]\."),
        ({"arms": ["static", "condconv:4,name=condconv:2"]}, "arm.condconv:2.variant.experts was 2 and is 4"),
        ({"budget": "time"}, "budget was 'steps' and is 'time'"),
        ({"seeds": 1}, "seeds was 2 and is 1"),
        ({"data": "other"}, "images.test was"),
    ],
)
def test_another_study_is_not_continued(
    data: Path, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_study.Study, "_missing", lambda self: iter(()))  # only what is recorded at the start
    monkeypatch.setattr(run_study.Study, "_trained", lambda self, row: small_net())
    study(data, tmp_path / "study")
    if "data" in changes:
        changes = {"data": write_images(tmp_path / "other", each=13)}
    with pytest.raises(InputError, match=message):
        study(changes.pop("data", data), tmp_path / "study", **changes)


def test_what_cannot_be_compared(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="converted already: inner is conditional"):
        compare(small_net(CondConv(2)), ARMS, study_options(), data=data, output=tmp_path / "a")
    with pytest.raises(InputError, match=r"matched 0 of|matches 0 of"):
        study(data, tmp_path / "b", ["static", "condconv:2,include=layer9"])
    with pytest.raises(InputError, match="No images are given"):
        compare(small_net(), ARMS, study_options(), output=tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/study.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"study.json cannot be read"):
        study(data, tmp_path / "d")


def test_a_rate_that_diverges_is_left_out(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step

    def diverging(self: Learner, batches: Any, number: int, steps: int) -> Any:
        if self.options.optimizer.lr > 0.02 and number == 4:
            raise self.diverged("loss", None, number)
        return step(self, batches, number, steps)

    monkeypatch.setattr(Learner, "step", diverging)
    report = study(data, tmp_path / "study", rates=2, seeds=1)
    for arm in report.record.arms:
        assert [(run.lr, run.val_top1 is None) for run in arm.search] == [(0.01, False), (0.03, True)]
        assert arm.lr == 0.01
    assert "diverged" in report.to_html()
    with pytest.raises(TrainingError, match=r"static diverged at each learning rate: 0\.03, 0\.09"):
        study(data, tmp_path / "other", rates=2, seeds=1, options={"optimizer": {"lr": 0.03}})


def test_equal_time_gives_a_faster_arm_more_epochs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"static": 0.10, "condconv:2": 0.24}
    monkeypatch.setattr(run_study, "measure_step_seconds", lambda arms, images, world: {n: times[n] for n in arms})
    report = study(data, tmp_path / "study", budget="time", seeds=1)
    assert [(arm.name, arm.epochs, arm.runs[0].epochs) for arm in report.record.arms] == [
        ("static", 5, 5),
        ("condconv:2", 2, 2),
    ]
    assert "Equal time" in " ".join(report.record.protocol)
    assert epochs_in_equal_time({"a": 1.0, "b": 1.0}, 3) == {"a": 3, "b": 3}


def test_unreadable_test_images_end_a_study_or_are_left_out(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", each=12)
    parts = find_three_parts(TrainingOptions().updated({"data": {"folder": str(data)}}).data, 0)
    Path(parts.test.name(2)).write_bytes(b"text")
    with pytest.raises(InputError, match="1 unreadable image:"):
        study(data, tmp_path / "study", seeds=1)
    report = study(data, tmp_path / "again", seeds=1, options={"data": {"max_bad": 1}})
    assert {len(run.correct) for arm in report.record.arms for run in arm.runs} == {5}


def test_the_package_offers_it() -> None:
    assert cs.compare is compare


def test_costs_are_added_to_the_record_of_another_loop() -> None:
    runs = (ScoredRun(0, "0110"),)
    record = StudyRecord("own", (ArmRecord("plain", runs), ArmRecord("wide", runs)))
    spec = InputSpec(height=16, width=16)
    networks = {"plain": small_net(), "wide": small_net(CondConv(4))}
    for network in networks.values():
        attach_recipe(network, Recipe(input=spec))
    plain, wide = with_costs(record, lambda arm: networks[arm.name]).arms
    assert plain.cost.parameters == sum(p.numel() for p in networks["plain"].parameters())
    assert wide.cost.macs - plain.cost.macs == 4 * (8 * 8 * 9 + 8) + 8 * 4, "mixing weights and biases, and routing"
    assert wide.cost.latency_ratio > 0
