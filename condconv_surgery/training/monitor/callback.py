"""Callbacks of a run: notes, steps, epochs and the use of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from condconv_surgery.training.monitor.expert_use import ExpertUse
from condconv_surgery.training.state.progress import TrainingResult
from condconv_surgery.training.tally import Tally


@dataclass(frozen=True)
class StepView:
    """The values of a step. ``memory`` is the peak, in MB.

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


class Callback:
    """Base class, called by the first process of a run. Its methods do nothing."""

    def rewind(self, step: int) -> None:
        """The run is at ``step``, 0 or that of its state: what was recorded of later steps will be repeated."""

    def note(self, line: str) -> None:
        """A message of one line."""

    def begin(self, lines: Sequence[str]) -> None:
        """The first step is next. lines: what is trained, and for how many steps."""

    def step(self, view: StepView) -> None:
        """A step is done."""

    def epoch(self, row: EpochRow) -> None:
        """An epoch is done and scored."""

    def gates(self, epoch: int, uses: dict[str, ExpertUse]) -> None:
        """The use of experts of each conditional layer, over the validation images of all processes."""

    def flush(self) -> None:
        """A state is about to be saved: what was recorded so far will not be repeated."""

    def close(self) -> None:
        """The run has ended, by an error too."""

    def end(self, result: TrainingResult, next_call: str) -> None:
        """``finetune`` returns ``result``, after ``close``. next_call: the call to make next; may be empty."""


class CallbackPair(Callback):
    """Calls two callbacks, one after the other."""

    def __init__(self, one: Callback, other: Callback) -> None:
        self.callbacks = (one, other)

    def rewind(self, step: int) -> None:
        for callback in self.callbacks:
            callback.rewind(step)

    def note(self, line: str) -> None:
        for callback in self.callbacks:
            callback.note(line)

    def begin(self, lines: Sequence[str]) -> None:
        for callback in self.callbacks:
            callback.begin(lines)

    def step(self, view: StepView) -> None:
        for callback in self.callbacks:
            callback.step(view)

    def epoch(self, row: EpochRow) -> None:
        for callback in self.callbacks:
            callback.epoch(row)

    def gates(self, epoch: int, uses: dict[str, ExpertUse]) -> None:
        for callback in self.callbacks:
            callback.gates(epoch, uses)

    def flush(self) -> None:
        for callback in self.callbacks:
            callback.flush()

    def close(self) -> None:
        for callback in self.callbacks:
            callback.close()

    def end(self, result: TrainingResult, next_call: str) -> None:
        for callback in self.callbacks:
            callback.end(result, next_call)
