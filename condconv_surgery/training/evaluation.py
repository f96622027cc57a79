"""Loss, top-1 and use of experts over the validation images, each counted once for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.errors import TrainingError
from condconv_surgery.models.classifier_logits import logits_of
from condconv_surgery.runtime.modes import in_mode
from condconv_surgery.training.batches.unreadable_images import UnreadableImages
from condconv_surgery.training.distributed.world import ONE_PROCESS, World
from condconv_surgery.training.learner import Learner
from condconv_surgery.training.monitor.expert_use import ExpertUse, ExpertUseMeter
from condconv_surgery.training.monitor.explained_errors import reading
from condconv_surgery.training.monitor.nonfinite import first_nonfinite
from condconv_surgery.training.tally import Tally


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    world: World = ONE_PROCESS,
    cast: Callable[[], AbstractContextManager[object]] = nullcontext,
    interrupted: Callable[[], bool] = lambda: False,
    unreadable: Callable[[tuple[str, ...]], object] = lambda names: None,
    nonfinite: Callable[[int], object] = lambda position: None,
    idle: Callable[[], object] | None = None,
) -> Tally | None:
    """Cross-entropy (without smoothing) and top-1 of ``model`` in eval mode; ``None`` once ``interrupted()`` is true.

    unreadable: called with the names of each batch's unreadable images, which are not counted.
    nonfinite: called at the end with the position of the first batch whose loss is not finite, if there is one.
    idle: called in a process that has no image left while others have, to run ``model`` on something that is not
        counted: a sharded model runs in all processes or in none.

    The sums stay on the device until the end. Each module has its own mode again afterwards.
    """
    tally = Tally(torch.zeros(3, dtype=torch.float64, device=world.device))
    losses: dict[int, Tensor] = {}
    stopped = False
    shared = batches if idle is None else _padded(batches, world)
    with in_mode(model, training=False):
        for position, batch in enumerate(shared):
            stopped = interrupted() if idle is None else bool(world.sum([float(interrupted())])[0])
            if stopped:
                break
            unreadable(batch.unreadable)
            if not len(batch.labels):
                if idle is not None:
                    idle()
                continue
            images, labels, _ = batch.to(world.device)
            with cast():
                logits = logits_of(model(images)).main.float()
            losses[position] = F.cross_entropy(logits, labels, reduction="sum")
            tally = tally + Tally.of_batch(losses[position], logits, labels)
    if not math.isfinite(tally.loss_sum):
        nonfinite(next(position for position, loss in losses.items() if not math.isfinite(loss)))
    total = Tally(world.sum_(tally.sums))
    return None if world.sum([float(stopped)])[0] else total


def score(
    learner: Learner,
    batches: Iterable[Batch],
    black: Tensor,
    unreadable: UnreadableImages,
    interrupted: Callable[[], bool],
    step: int,
) -> tuple[Tally, dict[str, ExpertUse]] | None:
    """Scores and use of experts of the model that is saved, after ``step`` steps; ``None`` once ``interrupted()``.

    black: an image of zeros. All processes must call it together. Raises ``TrainingError`` when no image can be read,
    or the loss is not finite: such a model is not saved.
    """
    learner.share_buffers()
    world, use = learner.world, ExpertUseMeter(learner.scored)
    nonfinite: list[int] = []

    def idle() -> None:
        with use.paused(), learner.cast():
            learner.scored(black)

    try:
        scores = evaluate(
            learner.scored,
            reading(batches),
            world=world,
            cast=learner.cast,
            interrupted=interrupted,
            unreadable=unreadable.add,
            nonfinite=nonfinite.append,
            idle=idle if learner.options.engine.shard else None,
        )
    finally:
        use.close()
    unreadable.share()
    if scores is None:
        return None
    if not scores.count:
        raise TrainingError("No validation image can be read.", "At least one must be readable.", 'data="FOLDER"')
    if not math.isfinite(scores.loss):
        bad = next(islice(batches, nonfinite[0], None)).images if nonfinite else black  # read again
        with in_mode(learner.scored, training=False):
            place = first_nonfinite(learner.scored, [bad.to(world.device)], learner.cast)
        raise learner.diverged("validation loss", place, step)
    return scores, use.together(world)


def _padded(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """``batches``, then empty ones until no process has any."""
    own = iter(batches)
    while True:
        batch = next(own, None)
        if not world.sum([float(batch is not None)])[0]:
            return
        yield Batch(torch.empty(0), torch.empty(0, dtype=torch.int64)) if batch is None else batch
