"""Train and eval mode, module by module."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Every batch norm of torch, also the synchronised one."""


def hold_statistics(model: nn.Module, below: Iterable[nn.Module] | None = None) -> int:
    """Put batch norms, all or those below some modules, into eval mode; returns how many there are."""
    norms = {
        id(m): m for top in ([model] if below is None else below) for m in top.modules() if isinstance(m, BatchNorm)
    }
    for norm in norms.values():
        norm.eval()
    return len(norms)
