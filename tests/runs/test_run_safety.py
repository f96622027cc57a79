"""Runs that lose no work: one at a time in a folder, a state before an error, data that change, options on a resume."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torchvision
from torch import nn
from torch.utils.data import DataLoader

from condconv_surgery.data.image_dataset import Draw, ImageDataset, collate
from condconv_surgery.errors import InputError
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import CondConv, InputSpec
from condconv_surgery.recipe.toml_text import from_toml
from condconv_surgery.reporting import recorded_accuracy
from condconv_surgery.training import finetune
from condconv_surgery.training.batches.unreadable_images import UnreadableImages
from condconv_surgery.training.state.run_state import LAST, read_state
from tests.images import find_training_images, write_images
from tests.small_networks import small_net
from tests.training.forked import fresh_script
from tests.training.test_explained_errors import AtStep
from tests.training.test_training_run import Crash, Killed, StopAt, assert_same, options_for, weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", each=7)  # 18 to train on, 3 to validate on


def test_an_error_in_a_run_saves_the_steps_before_it(folder: Path) -> None:
    """An image that becomes unreadable in the first epoch: no state was due, and none of the steps is lost."""
    whole, cut = options_for(folder, "whole"), options_for(folder, "cut")
    finetune(small_net(), whole)
    _, val = find_training_images(folder)
    content = val.path(0).read_bytes()
    with pytest.raises(InputError, match=r"1 unreadable image(.|\n)*The state after step 4 is kept\."):
        finetune(small_net(), cut, callback=AtStep(2, lambda: val.path(0).write_bytes(b"text")))
    assert read_state(Path(cut.output) / LAST).facts["progress"]["step"] == 4
    val.path(0).write_bytes(content)
    finetune(small_net(), cut, resume=True)
    assert_same(weights(whole), weights(cut))


def test_without_a_state_no_error_claims_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from condconv_surgery.errors import TrainingError
    from condconv_surgery.training import learner

    def train_step(*args: object, **how: object) -> object:
        raise MemoryError

    monkeypatch.setattr(learner, "train_step", train_step)
    with pytest.raises(TrainingError, match=r"No memory left after step 0(.|\n)*No state had been saved"):
        finetune(small_net(), options_for(folder))
    assert not (folder.parent / "run" / LAST).exists()


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_unreadable_image_may_be_removed_before_a_resume(folder: Path, part: str) -> None:
    """It stays in the order, so the weights are those of a run that was never stopped. The split does not move."""
    images = dict(zip(("train", "val"), find_training_images(folder), strict=True))[part]
    images.path(1).write_bytes(b"text")
    whole, cut = (options_for(folder, name).updated({"data": {"max_bad": 1}}) for name in ("whole", "cut"))
    finetune(small_net(), whole)
    finetune(small_net(), cut, callback=StopAt(6, signal.SIGTERM))
    images.path(1).unlink()
    callback = StopAt(-1, 0)
    result = finetune(small_net(), cut, resume=True, callback=callback)
    assert "1 unreadable image was removed since the run began; the others keep their order." in callback.lines
    assert result.unreadable == (str(images.path(1)),)
    assert_same(weights(whole), weights(cut))


def test_a_score_counts_the_images_that_could_be_read(folder: Path) -> None:
    """One of two right was called 50% of three images, with the interval of three."""
    _, val = find_training_images(folder)
    val.path(1).write_bytes(b"text")
    options = options_for(folder, epochs=1).updated({"data": {"max_bad": 1}})
    result = finetune(small_net(), options)
    recorded = recorded_accuracy(options.output)
    assert recorded is not None
    assert (len(val), result.val_images, recorded.images) == (3, 2, 2)
    assert recorded.top1 in (0.0, 0.5, 1.0)


def test_other_changes_of_the_images_are_refused_and_counted(folder: Path) -> None:
    options = options_for(folder, epochs=2)
    finetune(small_net(), options, callback=StopAt(3, signal.SIGTERM))
    (folder / "class0/new.png").write_bytes((folder / "class0/00.png").read_bytes())
    (folder / "class1/00.png").unlink()
    (folder / "class2/00.png").rename(folder / "class0/moved.png")
    message = (
        r"2 added \(class0/moved.png, class0/new.png\), 2 removed \(class1/00.png, class2/00.png\)\.\n"
        r".*an unreadable image may be removed or repaired"
    )
    with pytest.raises(InputError, match=message):
        finetune(small_net(), options, resume=True)


def test_separate_parts_are_recorded_with_their_part(tmp_path: Path) -> None:
    """Images of the two folders have the same names; one that is unreadable in ``val`` is not missed in ``train``."""
    for part in ("train", "val"):
        write_images(tmp_path / "data" / part, each=6)
    for part in ("train", "val"):
        (tmp_path / "data" / part / "class0/extra.png").write_bytes(b"text" if part == "val" else b"")
    (tmp_path / "data/train/class0/extra.png").write_bytes((tmp_path / "data/train/class0/00.png").read_bytes())
    options = options_for(tmp_path / "data").updated({"data": {"max_bad": 1}})
    finetune(small_net(), options, callback=StopAt(3, signal.SIGTERM))
    (tmp_path / "data/train/class0/extra.png").unlink()
    with pytest.raises(InputError, match=r"1 removed \(class0/extra.png\)"):
        finetune(small_net(), options, resume=True)
    (tmp_path / "data/train/class0/extra.png").write_bytes((tmp_path / "data/train/class0/00.png").read_bytes())
    (tmp_path / "data/val/class0/extra.png").unlink()
    assert finetune(small_net(), options, resume=True).epochs == 3


def test_a_run_is_not_made_shorter_than_it_is(folder: Path) -> None:
    options = options_for(folder, epochs=3)
    finetune(small_net(), options)
    recipe = (Path(options.output) / "recipe.toml").read_text()
    with pytest.raises(InputError, match=r"schedule.epochs=1, but the run is at step 12, in epoch 3(.|\n)*epochs=3 or"):
        finetune(small_net(), options.updated({"schedule": {"epochs": 1}}), resume=True)
    assert (Path(options.output) / "recipe.toml").read_text() == recipe
    assert finetune(small_net(), options, resume=True).epochs == 3


def test_a_recipe_with_relative_paths_resumes_from_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "val"):
        write_images(folder.parent / "parts" / part, each=6)
    monkeypatch.chdir(folder.parent)
    options = options_for(folder).updated({"output": "run", "data": {"folder": "parts/train", "val": "parts/val"}})
    finetune(small_net(), options, callback=StopAt(3, signal.SIGTERM))
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = from_toml((folder.parent / "run/recipe.toml").read_text())
    assert recipe.data.folder == str(folder.parent / "parts/train")
    assert finetune(small_net(), recipe, resume=True).epochs == 3
    assert list(elsewhere.iterdir()) == []
    monkeypatch.chdir(folder.parent)
    assert finetune(small_net(), options, resume=True).epochs == 3  # as it was typed


def test_a_run_inside_its_data_is_trained_and_resumed(folder: Path) -> None:
    options = options_for(folder).updated({"output": str(folder / "run")})
    assert finetune(small_net(), options, callback=StopAt(5, signal.SIGTERM)).classes == ("class0", "class1", "class2")
    assert finetune(small_net(), options, resume=True).epochs == 3


def test_a_stopped_run_has_curves(folder: Path) -> None:
    options = options_for(folder)
    finetune(small_net(), options, callback=StopAt(2, signal.SIGTERM))
    assert not (Path(options.output) / "curves.png").exists()  # no epoch yet
    finetune(small_net(), options, callback=StopAt(6, signal.SIGTERM), resume=True)
    assert (Path(options.output) / "curves.png").stat().st_size > 1000


def test_an_ignored_hangup_stays_ignored(folder: Path) -> None:
    """As nohup asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = finetune(small_net(), options_for(folder, epochs=1), callback=StopAt(2, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.stopped_by, result.epochs) == (0, 1)


def test_tensorboard_has_each_step_once_after_a_kill(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = options_for(folder).updated({"engine": {"tensorboard": True, "save_every": 3}})
    with pytest.raises(Killed):
        finetune(small_net(CondConv(2)), options, callback=Crash(8))  # states after 3, 4, 6
    finetune(small_net(CondConv(2)), options, resume=True)
    events = EventAccumulator(str(Path(options.output) / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/learning rate")] == list(range(1, 13))
    for tag in ("epoch/val_top1", "gate entropy/inner"):
        assert [event.step for event in events.Scalars(tag)] == [4, 8, 12]


UNGUARDED = """
import multiprocessing, sys
import torch
from condconv_surgery.training import finetune
from tests.small_networks import small_net
from tests.training.forked import fresh_script

multiprocessing.set_start_method("spawn")
torch.set_num_threads(1)
options = {"data": {"image_size": 16, "batch_size": 4, "workers": 1}, "schedule": {"epochs": 1}}
finetune(small_net(), options, data=sys.argv[1], output=sys.argv[2])
"""


def test_an_unguarded_script_with_spawned_processes_is_told_so(folder: Path) -> None:
    script = folder.parent / "script.py"
    script.write_text(UNGUARDED)
    done = fresh_script(script, folder, folder.parent / "run", folder=folder.parent)
    assert done.returncode == 1
    *_, given, allowed, fix = done.stderr.strip().splitlines()
    assert "ended before its first batch" in given
    assert "a script without a guard starts itself again" in allowed
    assert 'if __name__ == "__main__":' in fix
    assert "memory" not in given + allowed + fix


def test_micro_batches_of_one_value_are_refused_before_the_first_step(folder: Path) -> None:
    """small_net's map is 16x16 there, so its norm has enough values; a norm behind the pooling has one."""
    pooled = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 3)
    )
    options = options_for(folder, epochs=1).updated({"optimizer": {"accumulate": 4}})
    message = (
        r"one image at a time: the batch norm 2 would get one value(.|\n)*optimizer.accumulate=1, or data.image_size"
    )
    with pytest.raises(InputError, match=message):
        finetune(pooled, options)
    assert not Path(options.output).exists()
    assert finetune(pooled, options.updated({"layers": {"batch_norm": "freeze"}})).epochs == 1
    assert finetune(small_net(), options_for(folder, "other", epochs=1).updated({"optimizer": {"accumulate": 4}})).steps


def test_images_that_are_too_small_for_the_model_are_said_to_be(folder: Path) -> None:
    options = options_for(folder).updated({"data": {"image_size": 8}})
    with pytest.raises(InputError, match=r"does not run on images of 8x8: RuntimeError(.|\n)*data.image_size=64"):
        finetune(torchvision.models.squeezenet1_1(), options)


def test_an_image_that_cannot_be_read_says_why(folder: Path) -> None:
    """The reason comes with the name from a reading process, where the check has not looked at the image."""
    train, _ = find_training_images(folder)
    train.path(3).write_bytes(b"")
    unreadable = UnreadableImages(1)
    lines: list[str] = []
    unreadable.note = lines.append
    loader = DataLoader(
        ImageDataset(train, EvaluationTransform(InputSpec())),
        batch_sampler=[[Draw(0, 3)]],
        num_workers=1,
        collate_fn=collate,
    )
    for batch in loader:
        unreadable.add(batch.unreadable)
    unreadable.share()
    assert lines == [f"Unreadable, skipped: {train.path(3)} (empty)"]
