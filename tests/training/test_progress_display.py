from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from condconv_surgery.recipe import CondConv, TrainingOptions
from condconv_surgery.training import finetune
from condconv_surgery.training.monitor import progress_display as module
from condconv_surgery.training.monitor.callback import (
    Callback,
    CallbackPair,
    DispensableCallback,
    EpochRow,
    StepView,
)
from condconv_surgery.training.monitor.progress_display import PlainLines, ProgressBar, console_display
from condconv_surgery.training.monitor.training_curves import draw_curves
from condconv_surgery.training.tally import Tally
from tests.images import write_images
from tests.small_networks import small_net
from tests.training.forked import fresh_python

VIEW = StepView(2, 10, 150, 1000, Tally.of(2.46912, 1, 2), 9.87e-4, 123.4, 1024.0)
EPOCH_LINE = "epoch   2  train loss 1.2000 top-1 0.5100  val loss 1.1000 top-1 0.5500 best"
ROW = EpochRow(2, 200, 9.87e-4, None, 1.2, 0.51, 1.1, 0.55, 120.0, 60.0, 1024.0, True)
NEXT_VIEW = replace(VIEW, step=160)
MEASURES = "loss 1.2346  top-1 0.5000  123 images/s  lr 9.87e-04  1024 MB"


def test_plain_lines_are_few_and_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.0, 11.0, 12.0, 12.0, 12.0, 12.0, 20.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    callback = PlainLines()
    callback.step(VIEW)  # too soon for a line
    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.0)
    callback.step(NEXT_VIEW)
    callback.epoch(ROW)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"epoch 2/10  step 160/1000  0:02, 1:24 left  {MEASURES}",
        EPOCH_LINE,
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_a_terminal_has_a_bar_and_times_at_any_width(width: int) -> None:
    file = io.StringIO()
    callback = ProgressBar(Console(file=file, force_terminal=True, width=width, color_system=None))
    callback.step(VIEW)
    callback.timing.first_done = 140, callback.timing.began - 30.0  # ten steps in half a minute
    callback.read_at = -math.inf
    callback.step(VIEW)
    callback.epoch(ROW)
    callback.close()
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[\d?]*\w", "", file.getvalue()))
    bar = [line for line in lines if "left" in line][-1]
    assert max(len(line.rstrip()) for line in lines if line.startswith("epoch 2/10")) <= width
    assert re.match(r"epoch 2/10 [━╸╺ ]{10,30} 150/1000  0:00, 42:3\d left", bar)
    assert [text in bar for text in MEASURES.split("  ")] == [width >= w for w in (61, 75, 89, 102, 111)]
    if width >= 80:
        assert EPOCH_LINE in lines


def test_stderr_that_is_no_terminal_has_plain_lines() -> None:
    display = console_display()
    assert isinstance(display, DispensableCallback)
    assert isinstance(display.callback, PlainLines)


def test_both_callbacks_get_everything() -> None:
    told: list[str] = []

    class Telling(Callback):
        def __getattribute__(self, name: str):  # type: ignore[no-untyped-def]
            return lambda *args: told.append(name)

    both = CallbackPair(Telling(), Telling())
    both.note("line")
    both.step(VIEW)
    both.begin(["line"])
    both.epoch(ROW)
    both.gates(1, {})
    both.close()
    both.end(None, "")  # type: ignore[arg-type]
    assert told == [name for name in ("note", "step", "begin", "epoch", "gates", "close", "end") for _ in range(2)]


def test_a_kept_head_with_other_class_names_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_net(classes=3)
    for name in ("one", "two"):
        folder = write_images(tmp_path / name)
        if name == "two":
            (folder / "class0").rename(folder / "class9")
        sections = {"data": {"folder": str(folder), "image_size": 16, "workers": 0}, "schedule": {"epochs": 1}}
        finetune(
            model,
            TrainingOptions().updated({"output": str(tmp_path / f"run-{name}"), **sections}),
            callback=PlainLines(),
        )
        said = "they were called class0, class1, class2" in capsys.readouterr().err
        assert said == (name == "two")


def test_without_the_resource_module_memory_is_not_shown(tmp_path: Path) -> None:
    """Windows has none."""
    code = """
import sys, torch
sys.modules["resource"] = None
for name in [name for name in sys.modules if name.startswith("condconv_surgery.training.monitor")]:
    del sys.modules[name]
from condconv_surgery.training.monitor import progress_display, run_metrics
from condconv_surgery.training.monitor.callback import StepView
from condconv_surgery.training.tally import Tally
memory = run_metrics.peak_memory(torch.device("cpu"))
print(memory, *progress_display._measures(StepView(1, 1, 1, 1, Tally.of(1, 1, 1), 0.1, 1.0, memory)), sep="  ")
"""
    done = fresh_python(code, folder=tmp_path)
    assert done.stdout == "None  loss 1.0000  top-1 1.0000  1 images/s  lr 1.00e-01\n", done.stderr


def test_a_run_says_what_it_trains_what_it_reached_and_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "data")
    options = {
        "data": {"folder": str(folder), "image_size": 16, "workers": 0, "batch_size": 4},
        "optimizer": {"lr": 0.05},
    }
    options |= {"output": str(tmp_path / "run"), "schedule": {"epochs": 60, "early_stop": 1}}
    result = finetune(small_net(CondConv(experts=2), classes=3), options)
    lines = capsys.readouterr().err.splitlines()
    assert "Model: SmallNet with 1 conditional layer of 2 experts, 1,453 parameters; fp32 on cpu." in lines
    assert "Steps: 240 in 60 epochs, of 4 images 16x16; adamw, learning rate 0.05." in lines
    assert f"Stopped early after epoch {result.epochs}: no better top-1 since epoch {result.best_epoch}." in lines
    assert result.epochs < 60
    best, following = lines[-2:]
    assert best.startswith(f"Best top-1 {result.best_top1:.4f} in epoch {result.best_epoch}")
    assert best.endswith(f"(3 validation images): {tmp_path}/run/best.safetensors")
    needs_code = any(line.startswith("The files of this run need load(path, model=MyNet())") for line in lines)
    code = ", model=MyNet()" if needs_code else ""
    assert following == f'Next: report(load("{tmp_path}/run/best.safetensors"{code}), data="{tmp_path}/run")'


@pytest.mark.parametrize(
    ("callback", "progress", "shown"),
    [(None, None, True), (None, False, False), (Callback(), None, False), (Callback(), True, True)],
)
def test_progress_is_shown_unless_it_is_turned_off_or_a_callback_is_given(
    callback: Callback | None, progress: bool | None, shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "data")
    options = {
        "data": {"folder": str(folder), "image_size": 16, "workers": 0},
        "schedule": {"epochs": 1},
        "output": str(tmp_path / "run"),
    }
    finetune(small_net(classes=3), options, callback=callback, progress=progress)
    assert ("epoch   1  train loss" in capsys.readouterr().err) == shown


def test_ticks_of_epochs_are_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    ticks: list[float] = []
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **how: (
            ticks.extend(t for a in self.axes for t in a.get_xticks())
            or (tmp_path / "f").touch()
            or Path(args[0]).touch()
        ),
    )
    row = ROW.to_dict()
    draw_curves([row | {"epoch": 1}, row | {"epoch": 2}], tmp_path / "curves.png")
    assert ticks
    assert all(tick == int(tick) for tick in ticks)
