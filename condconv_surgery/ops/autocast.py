"""What autocast does to a tensor, asked so that devices without it can answer."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocast_on(x: Tensor) -> bool:
    """Autocast is enabled where ``x`` lives. (``torch.is_autocast_enabled`` raises for the meta device.)"""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor) -> Tensor:
    """``x`` as autocast gives it to a convolution: in autocast's dtype; float64, and all where it is off, as it is."""
    if not is_autocast_on(x) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
