"""What a run writes beside its weights, metrics and state does not end it: curves, TensorBoard events, its display."""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path

import pytest
from condconv_surgery.cli.output.console import say

from condconv_surgery.training import finetune
from condconv_surgery.training.monitor.callback import Callback, DispensableCallback, StepView
from tests.images import write_images
from tests.small_networks import small_net
from tests.training.test_training_run import StopAt, assert_same, options_for, weights


class FullDisk(io.StringIO):
    """A log on a full disk, or a terminal that is gone."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", each=7)


@pytest.mark.parametrize("stop", [0, 6])
def test_curves_that_cannot_be_written_do_not_end_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Nor do they of a run that is stopped; nothing of them remains, and a resumed call draws them."""
    from matplotlib.figure import Figure

    def full(figure: Figure, path: Path, **how: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    options, callback = options_for(folder), StopAt(stop, 15)
    monkeypatch.setattr(Figure, "savefig", full)
    result = finetune(small_net(), options, callback=callback)
    assert (result.stopped_by, result.steps) == ((15, 6) if stop else (0, 12))
    (line,) = [line for line in callback.lines if line.startswith("No curves: ")]
    assert "No space left on device" in line
    assert line.endswith("Everything else is saved; resume=True draws them later.")
    assert [path.name for path in Path(options.output).iterdir() if "curves" in path.name] == []
    monkeypatch.undo()
    finetune(small_net(), options, resume=True)
    assert (Path(options.output) / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("method", ["add_scalar", "flush", "close"])
def test_events_that_cannot_be_written_do_not_end_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    options = options_for(folder, epochs=1)
    finetune(small_net(), options)
    with_events = options_for(folder, "events", epochs=1).updated({"engine": {"tensorboard": True}})
    true = getattr(tensorboard.SummaryWriter, method)
    calls = 0

    def full(writer: object, *values: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            true(writer, *values)  # type: ignore[operator]
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, method, full)
    callback = StopAt(-1, 0)
    assert finetune(small_net(), with_events, callback=callback).epochs == 1
    (line,) = [line for line in callback.lines if line.startswith("TensorBoard")]
    assert "OSError: [Errno 28] No space left on device. The run goes on without them." in line
    assert_same(weights(options), weights(with_events))


def test_a_display_that_cannot_be_written_does_not_end_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", FullDisk())
    say("Loading")
    result = finetune(small_net(), options_for(folder, epochs=1))
    monkeypatch.undo()
    assert result.epochs == 1


def test_a_dispensable_callback_is_called_until_it_fails() -> None:
    told: list[str] = []
    errors: list[str] = []

    class Telling(Callback):
        def note(self, line: str) -> None:
            told.append(line)
            if line == "two":
                raise ValueError(line)

        def step(self, view: StepView) -> None:
            told.append("step")

        def close(self) -> None:
            told.append("closed")
            raise OSError("again")

    callback = DispensableCallback(Telling(), lambda error: errors.append(str(error)))
    for line in ("one", "two", "three"):
        callback.note(line)
    callback.close()
    assert (told, errors) == (["one", "two", "closed"], ["two"])
