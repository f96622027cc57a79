"""TensorBoard events of a run: loss, learning rate, scores, and the use of experts by layer."""

from __future__ import annotations

from pathlib import Path

from condconv_surgery.errors import InputError
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.monitor.callback import Callback, CallbackPair, EpochRow, StepView
from condconv_surgery.training.monitor.expert_use import ExpertUse


class TensorBoard(Callback):
    """Writes events into a folder. Raises ``InputError`` when TensorBoard is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "TensorBoard is not installed.",
                "engine.tensorboard needs it.",
                'pip install "condconv-surgery[track]", or engine.tensorboard=False',
            ) from error
        self.writer = SummaryWriter(str(folder))

    def step(self, view: StepView) -> None:
        self._scalar("train/loss of the epoch so far", view.loss, view.step)
        self._scalar("train/learning rate", view.lr, view.step)

    def epoch(self, row: EpochRow) -> None:
        for name in ("train_loss", "train_top1", "val_loss", "val_top1", "images_per_second"):
            self._scalar(f"epoch/{name}", getattr(row, name), row.epoch)

    def gates(self, epoch: int, uses: dict[str, ExpertUse]) -> None:
        for name, use in uses.items():
            self._scalar(f"gate entropy/{name}", use.entropy, epoch)
            for expert, share in enumerate(use.use):
                self._scalar(f"expert use/{name}/{expert}", share, epoch)

    def close(self) -> None:
        self.writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        self.writer.add_scalar(name, value, step)


def make_callback(options: TrainingOptions, callback: Callback | None, world: World) -> Callback:
    """The caller's callback, and TensorBoard where the options ask for it; silent in every process but the first."""
    if not world.is_first:
        return Callback()
    callback = callback or Callback()
    if options.engine.tensorboard:
        return CallbackPair(callback, TensorBoard(Path(options.output) / "tensorboard"))
    return callback
