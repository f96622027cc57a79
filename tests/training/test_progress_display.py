from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from condconv_surgery.recipe import TrainingOptions
from condconv_surgery.training import finetune
from condconv_surgery.training.monitor import progress_display as module
from condconv_surgery.training.monitor.callback import Callback, CallbackPair, EpochRow, StepView
from condconv_surgery.training.monitor.progress_display import PlainLines, ProgressBar, console_display
from condconv_surgery.training.tally import Tally
from tests.images import write_images
from tests.small_networks import small_net

VIEW = StepView(2, 10, 150, 1000, Tally.of(2.46912, 1, 2), 9.87e-4, 123.4, 1024.0)
ROW = EpochRow(2, 200, 9.87e-4, None, 1.2, 0.51, 1.1, 0.55, 120.0, 60.0, 1024.0, True)
WORDS = "loss 1.2346  top-1 0.5000  lr 9.87e-04  123 images/s  1024 MB"


def test_plain_lines_are_few_and_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    callback = PlainLines()
    callback.step(VIEW)  # too soon for another line
    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.0)
    callback.step(VIEW)
    callback.epoch(ROW)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"epoch 2/10  step 150/1000  {WORDS}",
        "epoch   2  train loss 1.2000  top-1 0.5100   val loss 1.1000  top-1 0.5500 * 120 images/s",
    ]


def test_a_terminal_has_a_bar_with_the_numbers_beside_it() -> None:
    file = io.StringIO()
    callback = ProgressBar(Console(file=file, force_terminal=True, width=160, color_system=None))
    callback.step(VIEW)
    callback.epoch(ROW)
    callback.close()
    text = file.getvalue()
    assert "epoch 2/10" in text
    assert f"150/1000  {WORDS}" in text
    assert "val loss 1.1000" in text


def test_stderr_that_is_no_terminal_has_plain_lines() -> None:
    assert isinstance(console_display(), PlainLines)


def test_both_callbacks_get_everything() -> None:
    told: list[str] = []

    class Telling(Callback):
        def __getattribute__(self, name: str):  # type: ignore[no-untyped-def]
            return lambda *args: told.append(name)

    both = CallbackPair(Telling(), Telling())
    both.note("line")
    both.step(VIEW)
    both.epoch(ROW)
    both.gates(1, {})
    both.close()
    assert told == ["note", "note", "step", "step", "epoch", "epoch", "gates", "gates", "close", "close"]


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


def test_without_the_resource_module_memory_is_not_shown() -> None:
    """Windows has none."""
    code = """
import sys
sys.modules["resource"] = None
import torch
from condconv_surgery.training.monitor import progress_display, run_metrics
from condconv_surgery.training.monitor.callback import StepView
from condconv_surgery.training.tally import Tally
memory = run_metrics.peak_memory(torch.device("cpu"))
print(memory, progress_display._measures(StepView(1, 1, 1, 1, Tally.of(1, 1, 1), 0.1, 1.0, memory)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None loss 1.0000  top-1 1.0000  lr 1.00e-01  1 images/s\n"
