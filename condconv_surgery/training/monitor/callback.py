"""Callbacks of a run: notes, steps, epochs and the use of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
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
    """One line of ``metrics.jsonl``. Losses in nats per image, top-1 as a share, rates in images per second.

    val_images: validation images that could be read.
    """

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
    val_images: int = 0

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


class ForwardingCallback(Callback):
    """Hands every call to ``forward``, by the name of the method."""

    def forward(self, name: str, *values: object) -> None:
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        self.forward("rewind", step)

    def note(self, line: str) -> None:
        self.forward("note", line)

    def begin(self, lines: Sequence[str]) -> None:
        self.forward("begin", lines)

    def step(self, view: StepView) -> None:
        self.forward("step", view)

    def epoch(self, row: EpochRow) -> None:
        self.forward("epoch", row)

    def gates(self, epoch: int, uses: dict[str, ExpertUse]) -> None:
        self.forward("gates", epoch, uses)

    def flush(self) -> None:
        self.forward("flush")

    def close(self) -> None:
        self.forward("close")

    def end(self, result: TrainingResult, next_call: str) -> None:
        self.forward("end", result, next_call)


class CallbackPair(ForwardingCallback):
    """Calls two callbacks, one after the other."""

    def __init__(self, one: Callback, other: Callback) -> None:
        self.callbacks = (one, other)

    def forward(self, name: str, *values: object) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(*values)


class DispensableCallback(ForwardingCallback):
    """Calls a callback until it fails, which must not end a run: it writes to a full disk or a closed terminal.

    failed: called once, with the error.
    """

    def __init__(self, callback: Callback, failed: Callable[[Exception], object] = lambda error: None) -> None:
        self.callback, self.failed = callback, failed
        self.works = True

    def forward(self, name: str, *values: object) -> None:
        if not self.works:
            return
        try:
            getattr(self.callback, name)(*values)
        except Exception as error:  # of a file system, a terminal or TensorBoard's own
            self.works = False
            with suppress(Exception):
                self.callback.close()  # it may have threads
            self.failed(error)
