"""One optimizer step: forward, loss, backward, clip, update."""

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
from condconv_surgery.models.classifier_logits import Logits, logits_of
from condconv_surgery.training.batches.augmentation import Mix
from condconv_surgery.training.distributed.fsdp import full_tensor
from condconv_surgery.training.distributed.world import ONE_PROCESS, World
from condconv_surgery.training.objective import classification_loss
from condconv_surgery.training.tally import Tally

Loss = Callable[[Logits, Tensor, Tensor], Tensor]
"""``(logits, images, target) -> loss``; the target is labels [B] or shares [B, K]."""


def plain_loss(logits: Logits, images: Tensor, target: Tensor) -> Tensor:
    """``classification_loss``: cross-entropy, auxiliary heads included."""
    return classification_loss(logits, target)


class NonFiniteError(Exception):
    """The loss (``where == "loss"``) or the gradient is NaN or infinite. The weights are unchanged."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


class Outcome(NamedTuple):
    """``tally`` over all processes; ``skipped``: loss scaling skipped the update of the weights."""

    tally: Tally
    skipped: bool = False


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """A function that makes the context of a forward pass; ``precision`` is fp32, bf16 or fp16."""
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
    world: World = ONE_PROCESS,
) -> Outcome:
    """Update the weights, or ``only`` some of them, once with the mean gradient over ``batches``.

    Raises ``NonFiniteError`` before the weights change, in all processes; with a ``scaler`` such a step is skipped and
    the scale is lowered instead. Raises ``OverflowError`` where a number of the optimizer is too large for the weights.
    """
    optimizer.zero_grad(set_to_none=True)
    tallies = []
    for position, batch in enumerate(batches):
        images, labels, _ = batch.to(world.device)
        images, target = (images, labels) if mix is None else mix(images, labels)
        with _without_reduction(model, position + 1 < len(batches)):
            with cast():
                logits = logits_of(model(images))
                loss = loss_of(logits, images, target)
            scaled = loss / len(batches) if scaler is None else scaler.scale(loss / len(batches))
            scaled.backward()  # type: ignore[no-untyped-call]
        tallies.append(Tally.of_batch(loss.detach().double() * len(target), logits.main.detach(), target))
    tally = Tally(world.sum_(sum(tallies[1:], tallies[0]).sums))
    skipped = _update(optimizer, tally, scaler, clip_norm, only)
    return Outcome(Tally() if skipped else tally, skipped)


def _update(
    optimizer: Optimizer,
    tally: Tally,
    scaler: GradScaler | None,
    clip_norm: float,
    only: Collection[nn.Parameter] | None,
) -> bool:
    """Clip and step; true when the scaler skipped.

    One device synchronisation a step, here, for the loss and the norm together: an optimizer must not see a gradient
    that is not finite, and torch's can be told so on the device (``found_inf``) in their fused forms only. The loss's
    own check comes first, while the batch is at hand for a diagnosis. (A scaler synchronises once more by itself.)
    """
    trained = _with_gradient(optimizer, only)
    if scaler is not None:
        scaler.unscale_(optimizer)  # after ``only``: an overflow in a parameter that is not trained does not count
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    loss_sum, size = torch.stack([tally.sums[0], full_tensor(norm).to(tally.sums)]).tolist()
    if scaler is None and not math.isfinite(loss_sum):
        raise NonFiniteError("loss")
    finite = math.isfinite(size)
    if finite and 0 < clip_norm < size:
        nn.utils.clip_grads_with_norm_(trained, clip_norm, norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif finite:
        _step(optimizer)
    else:
        raise NonFiniteError("gradient")
    return not finite


def _step(optimizer: Optimizer) -> None:
    """Raises ``OverflowError`` where a number of the optimizer, such as its rate, is beyond the weights' dtype."""
    try:
        optimizer.step()
    except RuntimeError as error:
        if "without overflow" in str(error):
            raise OverflowError(str(error).splitlines()[0]) from error
        raise


def _with_gradient(optimizer: Optimizer, only: Collection[nn.Parameter] | None) -> list[nn.Parameter]:
    """The optimizer's parameters that have a gradient; ``only`` some keep theirs, for optimizers skip the others."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if only is None:
        return parameters
    kept = {id(parameter) for parameter in only}
    for parameter in parameters:
        if id(parameter) not in kept:
            parameter.grad = None
    return parameters


def _without_reduction(model: nn.Module, more_to_come: bool) -> AbstractContextManager[object]:
    """Reduce gradients over processes once a step, with the last batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not more_to_come)
    if more_to_come and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
