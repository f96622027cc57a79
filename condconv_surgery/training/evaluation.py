"""Loss and top-1 over labelled images, each counted once however many processes share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.runtime.modes import in_mode
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.logits import logits_of


@dataclass
class Tally:
    """Sums over images: loss, right answers, how many. ``top1`` and ``loss`` are means."""

    loss_sum: float = 0.0
    right: float = 0.0
    count: float = 0.0

    def add(self, loss_sum: float, right: float, count: float) -> None:
        """Note some more images."""
        self.loss_sum += loss_sum
        self.right += right
        self.count += count

    @property
    def loss(self) -> float:
        """Mean loss per image, nats."""
        return self.loss_sum / self.count if self.count else 0.0

    @property
    def top1(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.count if self.count else 0.0


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    world: World = World(),  # noqa: B008  # frozen
    cast: Callable[[], AbstractContextManager[object]] = nullcontext,
    interrupted: Callable[[], bool] = lambda: False,
    unreadable: Callable[[tuple[str, ...]], object] = lambda names: None,
    strange: Callable[[Tensor], object] = lambda images: None,
    idle: Callable[[], object] | None = None,
) -> Tally | None:
    """Cross-entropy (without smoothing) and top-1 of ``model`` in eval mode; ``None`` once ``interrupted()`` is true.

    unreadable: given the names of each batch's unreadable images, which are not counted.
    strange: given the images of each batch whose loss is not finite.
    idle: called in a process that has no image left while others have, to run ``model`` on something that is not
        counted: a sharded model runs in all processes or in none.

    Each module has its own mode again afterwards.
    """
    tally = Tally()
    stopped = False
    shared = batches if idle is None else _in_step(batches, world)
    with in_mode(model, training=False):
        for batch in shared:
            stopped = interrupted() if idle is None else bool(world.sum([float(interrupted())])[0])
            if stopped:
                break
            unreadable(batch.unreadable)
            if not len(batch.labels):
                if idle is not None:
                    idle()
                continue
            images, labels = batch.images.to(world.device), batch.labels.to(world.device)
            with cast():
                logits = logits_of(model(images)).main.float()
            loss = F.cross_entropy(logits, labels, reduction="sum").item()
            if not math.isfinite(loss):
                strange(images)
            tally.add(loss, float((logits.argmax(1) == labels).sum().item()), len(labels))
    *sums, stops = world.sum([tally.loss_sum, tally.right, tally.count, float(stopped)])
    return None if stops else Tally(*sums)


def _in_step(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """``batches``, and empty ones after them until no process has any."""
    own = iter(batches)
    while True:
        batch = next(own, None)
        if not world.sum([float(batch is not None)])[0]:
            return
        yield Batch(torch.empty(0), torch.empty(0, dtype=torch.int64)) if batch is None else batch
