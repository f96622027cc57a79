"""TensorBoard events of a run: loss, learning rate, scores, and the use of experts by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from condconv_surgery.errors import InputError, one_line
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.monitor.callback import (
    Callback,
    CallbackPair,
    DispensableCallback,
    EpochRow,
    StepView,
)
from condconv_surgery.training.monitor.expert_use import ExpertUse

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Callback):
    """Writes events into a folder, all of them over steps. Raises ``InputError`` when TensorBoard is not installed.

    Events are flushed before each saved state, and those of steps after the state are purged when a run is resumed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "TensorBoard is not installed.",
                "engine.tensorboard needs it.",
                'pip install "condconv-surgery[track]", or engine.tensorboard=False',
            ) from error
        self.folder, self.kind = str(folder), SummaryWriter
        self.writer: SummaryWriter | None = None
        self.at = 0

    def rewind(self, step: int) -> None:
        self.at = step
        self.writer = self.kind(self.folder, purge_step=step + 1 if step else None)

    def step(self, view: StepView) -> None:
        self.at = view.step
        self._scalar("train/loss of the epoch so far", view.loss)
        self._scalar("train/learning rate", view.lr)

    def epoch(self, row: EpochRow) -> None:
        for name in ("train_loss", "train_top1", "val_loss", "val_top1", "images_per_second"):
            self._scalar(f"epoch/{name}", getattr(row, name))

    def gates(self, epoch: int, uses: dict[str, ExpertUse]) -> None:
        for name, use in uses.items():
            self._scalar(f"gate entropy/{name}", use.entropy)
            for expert, share in enumerate(use.use):
                self._scalar(f"expert use/{name}/{expert}", share)

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _scalar(self, name: str, value: float) -> None:
        if self.writer is not None:
            self.writer.add_scalar(name, value, self.at)


def make_callback(options: TrainingOptions, callback: Callback | None, world: World) -> Callback:
    """The caller's callback, and TensorBoard where the options ask for it; silent in every process but the first.

    Events that cannot be written, on a full disk, are noted once; the run goes on without them.
    """
    if not world.is_first:
        return Callback()
    callback = callback or Callback()
    if not options.engine.tensorboard:
        return callback
    events, note = TensorBoard(Path(options.output) / "tensorboard"), callback.note

    def failed(error: Exception) -> None:
        note(f"TensorBoard events end after step {events.at}: {one_line(error)}. The run goes on without them.")

    return CallbackPair(callback, DispensableCallback(events, failed))
