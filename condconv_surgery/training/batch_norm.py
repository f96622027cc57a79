"""Batch-norm statistics: frozen while the weights are trained, or recomputed with the final weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial

import torch
from torch import Tensor, nn

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.runtime.modes import device_of, in_mode
from condconv_surgery.runtime.snapshot import preserving_state
from condconv_surgery.training.distributed.world import ONE_PROCESS, World

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base class of every batch norm of torch, also of the synchronised one."""


def freeze_batch_norms(model: nn.Module, below: Iterable[nn.Module] | None = None) -> None:
    """Put batch norms, all or those below some modules, into eval mode."""
    for top in [model] if below is None else below:
        for module in top.modules():
            if isinstance(module, BatchNorm):
                module.eval()


def require_two_values(model: nn.Module, spec: InputSpec, options: TrainingOptions, world: int, images: int) -> None:
    """Raise ``InputError`` for a batch norm that would get one value for each channel from a micro-batch of ``images``.

    Runs the model on one black image, in its modes, and leaves it as it was. A sharded model is not checked.
    """
    if images > 1 or options.engine.shard:
        return
    name, parts = _norm_of_one_value(model, spec), world * options.optimizer.accumulate
    if name:
        fix = "optimizer.accumulate=1" if options.optimizer.accumulate > 1 else f"data.batch_size={2 * parts}"
        raise InputError(
            f"A step of {options.data.batch_size} images in {parts} parts trains on one image at a time: the batch "
            f"norm {name} would get one value for each channel.",
            "It needs two at least, from more images or from larger ones.",
            f'{fix}, or data.image_size={2 * max(spec.height, spec.width)}, or layers.batch_norm="freeze"',
        )


@torch.no_grad()
def _norm_of_one_value(model: nn.Module, spec: InputSpec) -> str:
    """The name of the first one in train mode; empty where there is none."""
    found: list[str] = []

    def look(name: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if norm.training and args[0].numel() == args[0].shape[1]:
            found.append(name)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, BatchNorm):
                stack.enter_context(module.register_forward_pre_hook(partial(look, name)))
        stack.enter_context(preserving_state(model))
        stack.enter_context(suppress(ValueError))  # torch's own error for it
        model(torch.zeros(1, spec.channels, spec.height, spec.width, device=device_of(model)))
    return found[0] if found else ""


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    world: World = ONE_PROCESS,
    cast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> int:
    """Replace the running statistics of the batch norms that are in train mode by the mean over ``batches``.

    Training leaves a moving average over the last steps, whose weights were different. The statistics of the processes
    are averaged. All other modules run in eval mode. Returns how many norms there are.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats and m.training]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    with in_mode(model, training=False):
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean
        for batch in batches:
            with cast():
                model(batch.images.to(world.device, non_blocking=True))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        world.mean_([t for t in (norm.running_mean, norm.running_var) if t is not None])
    return len(norms)
