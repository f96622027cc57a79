"""Train and eval mode, module by module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Every batch norm of torch, also the synchronised one."""


@contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """``model`` in one mode inside the block; afterwards each module in its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def hold_statistics(model: nn.Module, below: Iterable[nn.Module] | None = None) -> int:
    """Put batch norms, all or those below some modules, into eval mode; returns how many there are."""
    norms = {
        id(m): m for top in ([model] if below is None else below) for m in top.modules() if isinstance(m, BatchNorm)
    }
    for norm in norms.values():
        norm.eval()
    return len(norms)
