"""Modules that hold a whole model to run it in another way: in parallel, compiled or averaged."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel`` and ``torch.compile``."""
    while isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)) or is_compiled(model):
        inner = model._orig_mod if is_compiled(model) else model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def is_compiled(module: nn.Module) -> bool:
    """Made by ``torch.compile(model)``. (Its class is not imported: that takes seconds.)"""
    return type(module).__name__ == "OptimizedModule" and isinstance(module._modules.get("_orig_mod"), nn.Module)
