"""One optimizer step: forward, loss, backward, clip, move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from condconv_surgery.training.distributed import World
from condconv_surgery.training.evaluation import Tally
from condconv_surgery.training.outputs import Logits, logits_of
from condconv_surgery.training.pictures import Batch

AUXILIARY_WEIGHT = 0.3
"""Of each auxiliary head's loss, as GoogLeNet was trained."""


class NonFiniteLossError(Exception):
    """The loss of some process was not a number, or endless. The weights are untouched."""


def classification_loss(logits: Logits, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the batch, plus 0.3 times that of each auxiliary head. ``labels`` [B] int64."""
    loss = F.cross_entropy(logits.main.float(), labels, label_smoothing=smoothing)
    for extra in logits.auxiliary:
        loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(extra.float(), labels, label_smoothing=smoothing)
    return loss


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """A maker of the context that a forward pass runs in."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    loss_of: Callable[[Logits, Tensor], Tensor],
    cast: Callable[[], AbstractContextManager[object]] = nullcontext,
    clip_norm: float = 0.0,
    world: World = World(),  # noqa: B008  # frozen
) -> Tally:
    """Move the weights once by the mean gradient over ``batches``; returns the tally over all processes.

    Raises ``NonFiniteLossError`` before the weights are touched, in every process alike.
    """
    tally = Tally()
    optimizer.zero_grad(set_to_none=True)
    for position, batch in enumerate(batches):
        images, labels = batch.images.to(world.device), batch.labels.to(world.device)
        with _without_reduction(model, position + 1 < len(batches)):
            with cast():
                logits = logits_of(model(images))
                loss = loss_of(logits, labels)
            (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        right = float((logits.main.detach().argmax(1) == labels).sum().item())
        tally.add(loss.item() * len(labels), right, len(labels))
    tally = Tally(*world.sum([tally.loss_sum, tally.right, tally.count]))
    if not math.isfinite(tally.loss_sum):
        raise NonFiniteLossError
    if clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return tally


def _without_reduction(model: nn.Module, more_to_come: bool) -> AbstractContextManager[object]:
    """Gradients are exchanged between processes once a step, with the last batch."""
    if more_to_come and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
