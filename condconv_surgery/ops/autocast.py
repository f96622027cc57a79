"""Autocast's cast of a tensor, also on devices that have no autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocast_on(x: Tensor) -> bool:
    """Whether autocast is enabled where ``x`` is. (``torch.is_autocast_enabled`` raises for the meta device.)"""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives a convolution; unchanged in float64 or where autocast is off."""
    if not is_autocast_on(x) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
