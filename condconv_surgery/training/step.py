"""One optimizer step: forward, loss, backward, clip, move."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.training.batches.mixup import Mix
from condconv_surgery.training.distributed.fsdp import whole
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.evaluation import Tally
from condconv_surgery.training.logits import Logits, logits_of
from condconv_surgery.training.objective import classification_loss

Loss = Callable[[Logits, Tensor, Tensor], Tensor]
"""``(logits, images, target) -> loss``; the target is labels [B] or shares [B, K]."""


def plain_loss(logits: Logits, images: Tensor, target: Tensor) -> Tensor:
    """``classification_loss``: cross-entropy, auxiliary heads included."""
    return classification_loss(logits, target)


class NonFiniteError(Exception):
    """The loss (``where == "loss"``) or the gradient is not a number, or endless. The weights are untouched."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


class Outcome(NamedTuple):
    """``tally`` over all processes; ``skipped``: with loss scaling, the weights were not moved."""

    tally: Tally
    skipped: bool = False


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """A maker of the context that a forward pass runs in; ``precision`` is fp32, bf16 or fp16."""
    if precision == "fp32":
        return nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return lambda: torch.autocast(device.type, dtype=dtype)


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    loss_of: Loss = plain_loss,
    mix: Mix | None = None,
    cast: Callable[[], AbstractContextManager[object]] = nullcontext,
    scaler: GradScaler | None = None,
    clip_norm: float = 0.0,
    only: Collection[nn.Parameter] | None = None,
    world: World = World(),  # noqa: B008  # frozen
) -> Outcome:
    """Move the weights once by the mean gradient over ``batches``, or ``only`` some of them.

    Raises ``NonFiniteError`` before the weights are touched, in every process alike; with a ``scaler`` such a step is
    skipped and the scale lowered instead.
    """
    optimizer.zero_grad(set_to_none=True)
    tally = Tally()
    for position, batch in enumerate(batches):
        images, labels = batch.images.to(world.device), batch.labels.to(world.device)
        images, target = (images, labels) if mix is None else mix(images, labels)
        with _without_reduction(model, position + 1 < len(batches)):
            with cast():
                logits = logits_of(model(images))
                loss = loss_of(logits, images, target)
            scaled = loss / len(batches) if scaler is None else scaler.scale(loss / len(batches))
            scaled.backward()  # type: ignore[no-untyped-call]
        _count(tally, loss.detach(), logits.main.detach(), target)
    tally = Tally(*world.sum([tally.loss_sum, tally.right, tally.count]))
    if scaler is None and not math.isfinite(tally.loss_sum):
        raise NonFiniteError("loss")
    skipped = _move(optimizer, scaler, clip_norm, only)
    return Outcome(Tally() if skipped else tally, skipped)


def _move(
    optimizer: Optimizer,
    scaler: GradScaler | None,
    clip_norm: float,
    only: Collection[nn.Parameter] | None,
) -> bool:
    """Clip and step; true when the scaler skipped."""
    moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if only is not None:
        kept = {id(parameter) for parameter in only}
        for parameter in moved:
            if id(parameter) not in kept:
                parameter.grad = None  # an optimizer passes over a parameter without gradient
    if scaler is not None:
        scaler.unscale_(optimizer)  # after that: an overflow in what does not move is none
    norm = nn.utils.get_total_norm([p.grad for p in moved if p.grad is not None])
    size = whole(norm).item()
    finite = math.isfinite(size)
    if finite and 0 < clip_norm < size:
        nn.utils.clip_grads_with_norm_(moved, clip_norm, norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif finite:
        optimizer.step()
    else:
        raise NonFiniteError("gradient")
    return not finite


def _count(tally: Tally, loss: Tensor, logits: Tensor, target: Tensor) -> None:
    """Note a batch; of mixed images the class with the larger share is the right one."""
    labels = target if target.dim() == 1 else target.argmax(1)
    tally.add(loss.item() * len(labels), float((logits.argmax(1) == labels).sum().item()), len(labels))


def _without_reduction(model: nn.Module, more_to_come: bool) -> AbstractContextManager[object]:
    """Gradients are exchanged between processes once a step, with the last batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not more_to_come)
    if more_to_come and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
