"""Gradient checkpointing: keep only the input of a block, recompute its activations in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from condconv_surgery.training.batch_norm import BatchNorm


def checkpoint_blocks(model: nn.Module) -> list[nn.Module]:
    """Checkpoint every block, that is each member of an outermost ``nn.Sequential``; returns the blocks.

    The recomputation does not update batch-norm statistics. ``uncheckpoint`` undoes it.
    """
    blocks = [block for stack in _outermost(model) for block in stack if any(True for _ in block.parameters())]
    for block in blocks:
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=lambda block=block: (nullcontext(), _statistics_kept(block)),
        )
    return blocks


def uncheckpoint(blocks: list[nn.Module]) -> None:
    """Undo ``checkpoint_blocks``."""
    for block in blocks:
        block.__dict__.pop("forward", None)  # the method of the class is visible again


def _outermost(module: nn.Module) -> Iterator[nn.Sequential]:
    for child in module.children():
        if isinstance(child, nn.Sequential):
            yield child
        else:
            yield from _outermost(child)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    norms = [m for m in block.modules() if isinstance(m, BatchNorm)]
    before = [(m, m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
