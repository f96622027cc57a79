"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from condconv_surgery.training.gate_use import GateUse
from condconv_surgery.training.tally import Tally

PLAIN_SECONDS = 15.0
"""Seconds between two plain lines within an epoch."""

BAR_SECONDS = 0.1
"""Seconds between two readings of loss and top-1 for the bar, which is drawn as often."""


@dataclass(frozen=True)
class StepView:
    """A step as it is shown. ``memory`` in MB is the peak.

    ``loss`` and ``top1`` are means over the epoch so far. To read one is a device synchronisation.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    tally: Tally
    lr: float
    images_per_second: float
    memory: float | None

    @property
    def loss(self) -> float:
        """Mean training loss of the epoch so far, nats per image."""
        return self.tally.loss

    @property
    def top1(self) -> float:
        """Training top-1 of the epoch so far, 0 to 1."""
        return self.tally.top1


@dataclass(frozen=True)
class EpochRow:
    """One line of ``metrics.jsonl``. Losses in nats per image, top-1 as a share, rates in images per second."""

    epoch: int
    step: int
    lr: float
    temperature: float | None
    train_loss: float
    train_top1: float
    val_loss: float
    val_top1: float
    images_per_second: float
    seconds: float
    memory: float | None
    best: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Watcher(Protocol):
    """Told what happens, by rank 0."""

    def note(self, line: str) -> None:
        """Something worth a line."""

    def step(self, view: StepView) -> None:
        """A step is done."""

    def epoch(self, row: EpochRow) -> None:
        """An epoch is done and scored."""

    def gates(self, epoch: int, uses: dict[str, GateUse]) -> None:
        """How the validation images of all processes used the experts of each conditional layer."""

    def close(self) -> None:
        """No more is to come."""


class Silent:
    """Shows nothing."""

    def note(self, line: str) -> None:
        pass

    def step(self, view: StepView) -> None:
        pass

    def epoch(self, row: EpochRow) -> None:
        pass

    def gates(self, epoch: int, uses: dict[str, GateUse]) -> None:
        pass

    def close(self) -> None:
        pass


class Both:
    """Tells two watchers."""

    def __init__(self, one: Watcher, other: Watcher) -> None:
        self.watchers = (one, other)

    def note(self, line: str) -> None:
        for watcher in self.watchers:
            watcher.note(line)

    def step(self, view: StepView) -> None:
        for watcher in self.watchers:
            watcher.step(view)

    def epoch(self, row: EpochRow) -> None:
        for watcher in self.watchers:
            watcher.epoch(row)

    def gates(self, epoch: int, uses: dict[str, GateUse]) -> None:
        for watcher in self.watchers:
            watcher.gates(epoch, uses)

    def close(self) -> None:
        for watcher in self.watchers:
            watcher.close()


class PlainLines(Silent):
    """A line per epoch and every ``PLAIN_SECONDS``, for logs."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    def step(self, view: StepView) -> None:
        if time.monotonic() - self.last >= PLAIN_SECONDS:
            self.last = time.monotonic()
            self.note(f"epoch {view.epoch}/{view.epochs}  step {view.step}/{view.steps}  {_words(view)}")

    def epoch(self, row: EpochRow) -> None:
        self.last = time.monotonic()
        self.note(_epoch_line(row))


class Bar(Silent):
    """A rich progress bar with the numbers beside it; each finished epoch stays as a line above."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[words]}"),
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
            self.task = self.progress.add_task("", total=view.steps, epoch="", words="")
            self.progress.start()
        self.progress.update(self.task, completed=view.step, epoch=f"{view.epoch}/{view.epochs}")
        if time.monotonic() - self.read_at >= BAR_SECONDS:
            self.progress.update(self.task, words=_words(view))
            self.read_at = time.monotonic()

    def epoch(self, row: EpochRow) -> None:
        self.note(_epoch_line(row))

    def close(self) -> None:
        self.progress.stop()


def console_watcher() -> Watcher:
    """A bar when stderr is a terminal, else plain lines."""
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else PlainLines()


def _words(view: StepView) -> str:
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
