"""Whether autocast is on for a tensor, asked so that devices without it can answer."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocast_on(x: Tensor) -> bool:
    """Autocast is enabled where ``x`` lives. (``torch.is_autocast_enabled`` raises for the meta device.)"""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
