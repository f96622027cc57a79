"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from condconv_surgery.training.monitor.callback import Callback, EpochRow, StepView

PLAIN_SECONDS = 15.0
"""Seconds between two plain lines within an epoch."""

BAR_SECONDS = 0.1
"""Seconds between two readings of loss and top-1 for the bar, which is drawn as often."""


class PlainLines(Callback):
    """A line per epoch and every ``PLAIN_SECONDS``, for logs."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    def step(self, view: StepView) -> None:
        if time.monotonic() - self.last >= PLAIN_SECONDS:
            self.last = time.monotonic()
            self.note(f"epoch {view.epoch}/{view.epochs}  step {view.step}/{view.steps}  {_measures(view)}")

    def epoch(self, row: EpochRow) -> None:
        self.last = time.monotonic()
        self.note(_epoch_line(row))


class ProgressBar(Callback):
    """A rich progress bar with loss, top-1 and speed beside it; each completed epoch is printed above it."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[measures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.task: TaskID | None = None
        self.read_at = -math.inf

    def note(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, markup=False)

    def step(self, view: StepView) -> None:
        if self.task is None:
            self.task = self.progress.add_task("", total=view.steps, epoch="", measures="")
            self.progress.start()
        self.progress.update(self.task, completed=view.step, epoch=f"{view.epoch}/{view.epochs}")
        if time.monotonic() - self.read_at >= BAR_SECONDS:
            self.progress.update(self.task, measures=_measures(view))
            self.read_at = time.monotonic()

    def epoch(self, row: EpochRow) -> None:
        self.note(_epoch_line(row))

    def close(self) -> None:
        self.progress.stop()


def console_display() -> Callback:
    """A bar when stderr is a terminal, else plain lines."""
    console = Console(stderr=True)
    return ProgressBar(console) if console.is_terminal else PlainLines()


def _measures(view: StepView) -> str:
    memory = "" if view.memory is None else f"  {view.memory:.0f} MB"
    return (
        f"loss {view.loss:.4f}  top-1 {view.top1:.4f}  lr {view.lr:.2e}  {view.images_per_second:.0f} images/s{memory}"
    )


def _epoch_line(row: EpochRow) -> str:
    return (
        f"epoch {row.epoch:>3}  train loss {row.train_loss:.4f}  top-1 {row.train_top1:.4f}   "
        f"val loss {row.val_loss:.4f}  top-1 {row.val_top1:.4f}{' *' if row.best else '  '} "
        f"{row.images_per_second:.0f} images/s"
    )
