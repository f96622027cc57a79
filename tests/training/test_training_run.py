from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from condconv_surgery.errors import DamagedFileError, InputError, TrainingError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.models.artifact.save_load import load
from condconv_surgery.recipe import CondConv, DynamicConv, Variant
from condconv_surgery.recipe.toml_text import from_toml
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.surgery import convert
from condconv_surgery.training import TrainingResult, finetune
from condconv_surgery.training.monitor.callback import Callback, EpochRow, StepView
from condconv_surgery.training.state.run_state import BEFORE, LAST, read_state, save_state
from tests.images import write_images
from tests.small_networks import VARIANTS, small_net

STEPS_PER_EPOCH = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", each=7)  # 18 to train on, 3 to validate on


def options_for(folder: Path, run: str = "run", **schedule: object) -> TrainingOptions:
    return TrainingOptions().updated(
        {
            "output": str(folder.parent / run),
            "data": {"folder": str(folder), "image_size": 16, "batch_size": 4, "workers": 0},
            "optimizer": {"lr": 0.01},
            "schedule": {"epochs": 3, **schedule},
        }
    )


class StopAt(Callback):
    """Sends a signal to this process in the middle of a step, as a cluster would."""

    def __init__(self, step: int, number: int) -> None:
        self.at, self.number, self.lines = step, number, []

    def note(self, line: str) -> None:
        self.lines.append(line)

    def step(self, view: StepView) -> None:
        if view.step == self.at:
            os.kill(os.getpid(), self.number)


def run(options: TrainingOptions, variant: Variant | None = None, **how: object) -> TrainingResult:
    return finetune(small_net(variant), options, **how)  # type: ignore[arg-type]


def weights(options: TrainingOptions, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(Path(options.output) / f"{name}.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_run_learns_and_leaves_its_files(folder: Path, variant: Variant | None) -> None:
    options = options_for(folder, epochs=8, temperature=10.0)
    result = run(options, variant)
    output = Path(options.output)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert result.best_top1 == max(row["val_top1"] for row in rows)
    assert result.best_top1 > 0.5
    assert (result.steps, result.stopped_by, result.heads) == (32, 0, {"head": 3})
    assert from_toml((output / "recipe.toml").read_text()) == options
    assert {path.name for path in output.iterdir()} == {
        "last.safetensors",
        "best.safetensors",
        "metrics.jsonl",
        "recipe.toml",
        "curves.png",
        "data.json",
        "images.jsonl",
        LAST,
        BEFORE,
    }
    json.dumps(result.to_dict())


def test_a_model_by_name_is_trained_with_a_mapping_of_options(folder: Path, tmp_path: Path) -> None:
    """The seed also initialises a model that is made from a name."""
    sections = {"data": {"image_size": 16, "batch_size": 4, "workers": 0}, "schedule": {"epochs": 1}}
    results = [
        finetune("tests.small_networks:small_net", {**sections, "trust": ["tests"]}, data=folder, output=tmp_path / run)
        for run in ("one", "other")
    ]
    assert results[0].output == str(tmp_path / "one")
    assert results[0].top1 == results[1].top1
    assert_same(load_file(tmp_path / "one/last.safetensors"), load_file(tmp_path / "other/last.safetensors"))
    recipe = from_toml((tmp_path / "one/recipe.toml").read_text())
    assert (recipe.model, recipe.data.folder) == ("tests.small_networks:small_net", str(folder))


@pytest.mark.parametrize("converted", [False, True])
def test_a_model_of_grey_images(folder: Path, tmp_path: Path, converted: bool) -> None:
    """Without a recipe the input has the channels of the first layer, and mean and std as many values."""
    model: nn.Module = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    if converted:
        model = convert(model, CondConv(2), example=torch.randn(2, 1, 16, 16)).model
    options = {"data": {"image_size": 16, "batch_size": 4, "workers": 0}, "schedule": {"epochs": 1}}
    assert finetune(model, options, data=folder, output=tmp_path / "run").epochs == 1


def test_model_data_and_output_are_required(folder: Path) -> None:
    with pytest.raises(InputError, match=r'No output folder is given.(.|\n)*output="RUN"'):
        finetune(small_net(), data=folder)
    with pytest.raises(InputError, match=r'No images are given.(.|\n)*data="FOLDER"'):
        finetune(small_net(), {"output": "run"})
    with pytest.raises(InputError, match=r'No model is given.(.|\n)*finetune\("MODEL", data="FOLDER"'):
        finetune("", data=folder, output="run")


def test_the_saved_model_is_the_trained_one(folder: Path) -> None:
    options = options_for(folder)
    model = small_net(CondConv(experts=2))
    finetune(model, options)
    again = load(Path(options.output) / "last.safetensors", model=small_net())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_experts_separate_and_temperature_is_annealed(folder: Path) -> None:
    model = small_net(DynamicConv(experts=2))
    finetune(model, options_for(folder, temperature=30.0, temperature_steps=0.5))
    (layer,) = conditional_layers(model).values()
    assert layer.router.temperature == 1.0
    assert layer.router.linear.weight.abs().sum() > 0  # type: ignore[union-attr, operator]


def test_the_same_seed_gives_the_same_weights_whatever_the_workers(folder: Path) -> None:
    one, other, third = (options_for(folder, name) for name in ("one", "other", "third"))
    run(one)
    run(other.updated({"data": {"workers": 2}}))
    run(third.updated({"seed": 1}))
    assert_same(weights(one), weights(other))
    with pytest.raises(AssertionError):
        assert_same(weights(one), weights(third))


@pytest.fixture
def hang_up_ends() -> Iterator[None]:
    """SIGHUP as a terminal has it: nohup, under which tests may run, ignores it, and so does a run then."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up_ends")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("at", [1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2, 3 * STEPS_PER_EPOCH])
def test_a_stopped_run_goes_on_to_the_same_weights(folder: Path, number: int, at: int) -> None:
    whole, cut = options_for(folder, "whole"), options_for(folder, "cut")
    variant = DynamicConv(experts=2)
    expected = run(whole, variant)
    callback = StopAt(at, number)
    stopped = run(cut, variant, callback=callback)
    assert (stopped.stopped_by, stopped.steps) == (number, at)
    assert any("resume=True" in line for line in callback.lines)
    result = run(cut, variant, resume=True)
    assert_same(weights(whole), weights(cut))
    assert_same(weights(whole, "best"), weights(cut, "best"))
    assert (result.top1, result.loss, result.best_epoch) == (expected.top1, expected.loss, expected.best_epoch)
    assert [r["train_loss"] for r in _rows(whole)] == [r["train_loss"] for r in _rows(cut)]


def _rows(options: TrainingOptions) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(options.output) / "metrics.jsonl").read_text().splitlines()]


def test_signal_handlers_are_put_back(folder: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(options_for(folder, epochs=1))
    assert signal.getsignal(signal.SIGTERM) is before


class Killed(BaseException):
    """As by SIGKILL: nothing is saved on the way out."""


class Crash(Callback):
    """Dies in the midst of an epoch."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, view: StepView) -> None:
        if view.step == self.at:
            raise Killed


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_state_falls_back_to_the_one_before(folder: Path, damage: str) -> None:
    whole, cut = options_for(folder, "whole"), options_for(folder, "cut")
    run(whole)
    with pytest.raises(Killed):
        run(cut.updated({"engine": {"save_every": 3}}), callback=Crash(8))  # states after 3, 4, 6
    last = Path(cut.output) / LAST
    content = bytearray(last.read_bytes())
    content[-5] ^= 1
    last.write_bytes({"truncate": content[:-9], "flip": content, "empty": b""}[damage])
    callback = StopAt(-1, 0)
    run(cut.updated({"engine": {"save_every": 3}}), resume=True, callback=callback)
    assert any("damaged" in line for line in callback.lines)
    assert any("after step 4, epoch 1" in line for line in callback.lines)
    assert_same(weights(whole), weights(cut))


def test_no_undamaged_state_is_an_error(folder: Path) -> None:
    options = options_for(folder)
    run(options)
    for name in (LAST, BEFORE):
        (Path(options.output) / name).write_bytes(b"")
    with pytest.raises(DamagedFileError, match="No undamaged state is left"):
        run(options, resume=True)


def test_resume_without_a_state_begins(folder: Path) -> None:
    one, other = options_for(folder, "one"), options_for(folder, "other")
    run(one)
    run(other, resume=True)
    assert_same(weights(one), weights(other))


def test_a_finished_run_is_only_extended(folder: Path) -> None:
    options = options_for(folder)
    run(options)
    done = run(options, resume=True)
    assert (done.epochs, done.steps) == (3, 12)
    callback = StopAt(-1, 0)
    longer = run(options.updated({"schedule": {"epochs": 4}}), resume=True, callback=callback)
    assert any("follow the new length" in line for line in callback.lines)
    assert (longer.epochs, longer.steps) == (4, 16)


def test_a_second_run_does_not_overwrite_the_first(folder: Path) -> None:
    options = options_for(folder, epochs=1)
    run(options)
    with pytest.raises(InputError, match=r"already holds a run\.\n.*\n.*resume=True"):
        run(options)


def test_resume_refuses_other_options_and_other_images(folder: Path) -> None:
    options = options_for(folder, epochs=1)
    run(options)
    with pytest.raises(InputError, match=r"optimizer\.lr was 0\.01 and is 0\.1"):
        run(options.updated({"optimizer": {"lr": 0.1}}), resume=True)
    next(folder.rglob("*.png")).unlink()
    with pytest.raises(InputError, match="not those that the run began with"):
        run(options, resume=True)


def test_resume_refuses_another_model(folder: Path) -> None:
    options = options_for(folder, epochs=1)
    run(options)
    with pytest.raises(InputError, match=r"not the one that the run began with: inner was Conv2d\(8, 8, .*is absent"):
        run(options, CondConv(experts=2), resume=True)


def test_resume_refuses_other_layers_with_tensors_of_the_same_shapes(folder: Path) -> None:
    options = options_for(folder, epochs=1)
    run(options)
    net = small_net()
    net.inner = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
    net.dropout = nn.Dropout(0.5)
    with pytest.raises(InputError) as error:
        finetune(net, options, resume=True)
    assert "inner was Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)) and is " in error.value.given
    assert error.value.given.endswith(
        "; dropout was Dropout(p=0.1, inplace=False) and is Dropout(p=0.5, inplace=False)."
    )
    assert run(options.updated({"schedule": {"epochs": 2}}), resume=True).epochs == 2


def test_a_state_without_a_list_of_layers_is_resumed(folder: Path) -> None:
    """As one of an earlier version, which notices tensors of other shapes only."""
    options = options_for(folder, epochs=1)
    run(options)
    state = read_state(Path(options.output) / LAST)
    del state.facts["modules"]
    save_state(Path(options.output), state)
    with pytest.raises(TrainingError, match="of another model"):
        run(options.updated({"schedule": {"epochs": 2}}), CondConv(experts=2), resume=True)
    assert run(options.updated({"schedule": {"epochs": 2}}), resume=True).epochs == 2


def test_an_unreadable_image_stops_the_run_or_is_skipped(folder: Path) -> None:
    for path in folder.rglob("0[0-3].png"):
        path.write_bytes(b"text")
    with pytest.raises(InputError, match=r"unreadable image.*\n.*At most 0.*\n.*data\.max_bad"):
        run(options_for(folder))
    result = run(options_for(folder, "patient").updated({"data": {"max_bad": 12}}))
    assert len(result.unreadable) == 12
    assert result.epochs == 3


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(folder: Path) -> None:
    options = options_for(folder).updated({"optimizer": {"lr": 1e30, "clip_norm": 0.0}})
    with pytest.raises(
        TrainingError,
        match=r"loss is not finite at step 2; first in the output of \w+ .*\n.*No state .*\n.*optimizer\.lr=0\.001, ",
    ):
        run(options)


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/proc/version").exists(), reason="needs a place that root cannot write"
)
def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        run(options_for(folder).updated({"output": "/proc/run"}))
    with pytest.raises(InputError, match="cannot be written"):
        run(options_for(folder).updated({"output": str(next(folder.rglob("*.png")))}))


def test_a_full_disk_ends_with_an_error_and_the_last_state_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_for(folder)
    run(options)
    state = (Path(options.output) / LAST).read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("condconv_surgery.training.state.run_state.save_file", full)
    longer = options.updated({"schedule": {"epochs": 4}})
    with pytest.raises(TrainingError, match=r"No space left on device.*\n.*after step 12 is kept.*\n.*resume=True"):
        run(longer, resume=True, callback=StopAt(13, signal.SIGTERM))
    assert (Path(options.output) / LAST).read_bytes() == state
    assert not list(Path(options.output).glob(".*.tmp"))


def test_bf16_trains(folder: Path) -> None:
    result = run(options_for(folder, epochs=6).updated({"engine": {"precision": "bf16"}}), CondConv(experts=2))
    assert result.best_top1 is not None
    assert result.best_top1 > 0.5


def test_the_callback_gets_every_step_and_epoch(folder: Path) -> None:
    class Counting(Callback):
        def __init__(self) -> None:
            self.steps: list[StepView] = []
            self.rows: list[EpochRow] = []

        def step(self, view: StepView) -> None:
            self.steps.append(view)

        def epoch(self, row: EpochRow) -> None:
            self.rows.append(row)

    callback = Counting()
    run(options_for(folder), callback=callback)
    assert [view.step for view in callback.steps] == list(range(1, 13))
    assert [row.to_dict() for row in callback.rows] == _rows(options_for(folder))
    assert callback.rows[0].images_per_second > 0


def test_tensorboard_has_scores_and_the_use_of_experts(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = options_for(folder).updated({"engine": {"tensorboard": True}})
    run(options, CondConv(experts=2))
    events = EventAccumulator(str(Path(options.output) / "tensorboard"))
    events.Reload()
    top1 = [event.value for event in events.Scalars("epoch/val_top1")]
    assert top1 == pytest.approx([row["val_top1"] for row in _rows(options)])
    shares = [events.Scalars(f"expert use/inner/{expert}")[-1].value for expert in range(2)]
    assert sum(shares) == pytest.approx(1.0)
    assert 0 <= events.Scalars("gate entropy/inner")[-1].value <= 1 + 1e-6


def test_the_curves_plot_every_epoch(folder: Path) -> None:
    from PIL import Image

    options = options_for(folder)
    run(options)
    with Image.open(Path(options.output) / "curves.png") as image:
        assert image.size == (1080, 420)
        assert len(image.convert("L").getcolors() or []) > 10


def test_early_stop_ends_the_run(folder: Path) -> None:
    result = run(options_for(folder, epochs=40, early_stop=2))
    assert result.epochs == result.best_epoch + 2 < 40


def test_recalibrated_statistics_are_in_the_last_model(folder: Path) -> None:
    plain, measured = options_for(folder, "plain"), options_for(folder, "measured")
    run(plain)
    run(measured.updated({"layers": {"batch_norm": "recalibrate"}}))
    one, other = weights(plain), weights(measured)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert differing == {"norm.running_mean", "norm.running_var"}


def test_a_deterministic_run_sets_torch_back(folder: Path) -> None:
    run(options_for(folder, epochs=1).updated({"engine": {"deterministic": True}}))
    assert not torch.are_deterministic_algorithms_enabled()
