"""The validation images: loss, top-1, and how they use the experts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

from torch import Tensor

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.errors import TrainingError
from condconv_surgery.runtime.modes import in_mode
from condconv_surgery.training.batches.unreadable_images import Unreadable
from condconv_surgery.training.evaluation import evaluate
from condconv_surgery.training.gate_use import GateMeter, GateUse
from condconv_surgery.training.learner import Learner
from condconv_surgery.training.monitor.explained_errors import reading
from condconv_surgery.training.monitor.nonfinite import first_nonfinite
from condconv_surgery.training.state.stop_signals import StopWish
from condconv_surgery.training.tally import Tally


def score(
    learner: Learner, batches: Iterable[Batch], black: Tensor, unreadable: Unreadable, wish: StopWish, step: int
) -> tuple[Tally, dict[str, GateUse]] | None:
    """The scores of the model that is saved, after ``step`` steps; ``None`` when the run is to stop.

    black: one empty image. All processes must call it at the same time. Raises ``TrainingError`` when no image can
    be read, or the loss is not finite: such a model is not saved.
    """
    learner.share_buffers()
    world, gates = learner.world, GateMeter(learner.scored)
    nonfinite: list[int] = []

    def idle() -> None:
        with gates.paused(), learner.cast():
            learner.scored(black)

    try:
        scores = evaluate(
            learner.scored,
            reading(batches),
            world=world,
            cast=learner.cast,
            interrupted=lambda: bool(wish),
            unreadable=unreadable.meet,
            nonfinite=nonfinite.append,
            idle=idle if learner.options.engine.shard else None,
        )
    finally:
        gates.close()
    unreadable.share()
    if scores is None:
        return None
    if not scores.count:
        raise TrainingError("No validation image can be read.", "At least one must be readable.", "--data FOLDER")
    if not math.isfinite(scores.loss):
        bad = next(islice(batches, nonfinite[0], None)).images if nonfinite else black  # read again
        with in_mode(learner.scored, training=False):
            place = first_nonfinite(learner.scored, [bad.to(world.device)], learner.cast)
        raise learner.diverged("validation loss", place, step)
    return scores, gates.together(world)
