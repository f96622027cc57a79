"""Autocast's cast of a tensor, also on devices that have no autocast."""

from __future__ import annotations

import torch
from torch import Tensor

# torch.is_autocast_enabled raises for these; torch.compile of torch 2.10 cannot trace torch.amp.is_autocast_available
WITHOUT_AUTOCAST = ("meta", "lazy", "vulkan")


def is_autocast_on(x: Tensor) -> bool:
    """Whether autocast is enabled where ``x`` is."""
    return x.device.type not in WITHOUT_AUTOCAST and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives a convolution; unchanged in float64 or where autocast is off."""
    if not is_autocast_on(x) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
