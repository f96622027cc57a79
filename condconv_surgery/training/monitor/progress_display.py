"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from condconv_surgery.training.monitor.callback import (
    Callback,
    CallbackPair,
    DispensableCallback,
    EpochRow,
    StepView,
)
from condconv_surgery.training.monitor.run_summary import best_line
from condconv_surgery.training.state.progress import TrainingResult

PLAIN_SECONDS = 15.0
"""Seconds between two plain lines within an epoch."""

BAR_SECONDS = 0.1
"""Seconds between two readings of loss and top-1 for the bar, which is drawn as often."""

NARROW_BAR, WIDE_BAR = 10, 30
"""Columns of the bar: at least, and at most."""


class PlainLines(Callback):
    """A line per epoch and every ``PLAIN_SECONDS``, for logs."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.timing = Timing()

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    def begin(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.note(line)

    def step(self, view: StepView) -> None:
        self.timing.step(view)
        if time.monotonic() - self.last >= PLAIN_SECONDS:
            self.last = time.monotonic()
            measures = "  ".join((self.timing.text(view), *_measures(view)))
            self.note(f"epoch {view.epoch}/{view.epochs}  step {view.step}/{view.steps}  {measures}")

    def epoch(self, row: EpochRow) -> None:
        self.last = time.monotonic()
        self.note(_epoch_line(row))

    def end(self, result: TrainingResult, next_call: str) -> None:
        self.note(best_line(result))
        if next_call:
            self.note(f"Next: {next_call}")


class ProgressBar(PlainLines):
    """A bar with elapsed and remaining time and, as the width allows, loss, top-1, speed, learning rate and memory.

    Each completed epoch is printed above it.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.bar = BarColumn(bar_width=NARROW_BAR)
        self.progress = Progress(
            TextColumn("{task.fields[before]}", markup=False),
            self.bar,
            TextColumn("{task.fields[after]}", markup=False),
            console=console,
        )
        self.task: TaskID | None = None
        self.read_at = -math.inf

    def note(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, markup=False)

    def step(self, view: StepView) -> None:
        self.timing.step(view)
        if self.task is None:
            self.task = self.progress.add_task("", total=view.steps, before="", after="")
        self.progress.update(self.task, completed=view.step)
        if time.monotonic() - self.read_at >= BAR_SECONDS or view.step == view.steps:
            before, after, width = bar_line(view, self.timing.text(view), self.progress.console.width)
            self.bar.bar_width = width
            self.progress.update(self.task, before=before, after=after)
            self.read_at = time.monotonic()
        self.progress.start()  # with texts; nothing happens when it has started

    def epoch(self, row: EpochRow) -> None:
        self.note(_epoch_line(row))

    def close(self) -> None:
        self.progress.stop()


class BestEpoch(Callback):
    """Shows the notes of a run, and of its epochs the best one alone, at the end: a study has many runs."""

    def __init__(self, display: Callback) -> None:
        self.display, self.best = display, ""

    def note(self, line: str) -> None:
        self.display.note(line)

    def step(self, view: StepView) -> None:
        self.display.step(view)

    def epoch(self, row: EpochRow) -> None:
        if row.best:
            self.best = f"  best epoch {row.epoch}: validation top-1 {row.val_top1:.4f}"

    def close(self) -> None:
        if self.best:
            self.display.note(self.best)
        self.display.close()


class Timing:
    """Elapsed and remaining time of a run, validation included.

    The rate is that of the steps after this process's first one, which warms up or compiles.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.first_done: tuple[int, float] | None = None

    def step(self, view: StepView) -> None:
        if self.first_done is None:
            self.first_done = view.step, time.monotonic()

    def text(self, view: StepView) -> str:
        """``1:02, 12:40 left``; after the first step ``0:05, -:-- left``."""
        now = time.monotonic()
        first, at = self.first_done or (view.step, now)
        known = view.step > first
        left = duration((now - at) / (view.step - first) * (view.steps - view.step)) if known else "-:--"
        return f"{duration(now - self.began)}, {left} left"


def console_display() -> Callback:
    """A bar when stderr is a terminal, else plain lines; silent once stderr fails (a log on a full disk)."""
    console = Console(stderr=True)
    return DispensableCallback(ProgressBar(console) if console.is_terminal else PlainLines())


def displayed(callback: Callback | None, progress: bool) -> Callback:
    """``callback``, with a display of progress on stderr beside it if that is wanted."""
    if not progress:
        return callback or Callback()
    return console_display() if callback is None else CallbackPair(console_display(), callback)


def bar_line(view: StepView, time_text: str, width: int) -> tuple[str, str, int]:
    """The text before the bar, the text behind it, and the columns of the bar; together ``width`` at most."""
    before = f"epoch {view.epoch}/{view.epochs}"
    after = f"{view.step}/{view.steps}  {time_text}"
    room = width - len(before) - NARROW_BAR - 2 - len(after)
    for text in _measures(view):
        if len(text) + 2 > room:
            break
        after, room = f"{after}  {text}", room - len(text) - 2
    return before, after, min(WIDE_BAR, NARROW_BAR + max(0, room))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; hours where there are some.

    >>> duration(62), duration(3725)
    ('1:02', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _measures(view: StepView) -> list[str]:
    """Most important first."""
    speed = f"{view.images_per_second:.0f} images/s"
    memory = [] if view.memory is None else [f"{view.memory:.0f} MB"]
    return [f"loss {view.loss:.4f}", f"top-1 {view.top1:.4f}", speed, f"lr {view.lr:.2e}", *memory]


def _epoch_line(row: EpochRow) -> str:
    """At most 80 columns up to epoch 999."""
    return (
        f"epoch {row.epoch:>3}  train loss {row.train_loss:.4f} top-1 {row.train_top1:.4f}  "
        f"val loss {row.val_loss:.4f} top-1 {row.val_top1:.4f}{' best' if row.best else ''}"
    )
