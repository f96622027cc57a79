"""Batch-norm statistics: frozen while the weights are trained, or recomputed with the final weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.runtime.modes import in_mode
from condconv_surgery.training.distributed.world import ONE_PROCESS, World

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base class of every batch norm of torch, also of the synchronised one."""


def freeze_batch_norms(model: nn.Module, below: Iterable[nn.Module] | None = None) -> None:
    """Put batch norms, all or those below some modules, into eval mode."""
    for top in [model] if below is None else below:
        for module in top.modules():
            if isinstance(module, BatchNorm):
                module.eval()


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
