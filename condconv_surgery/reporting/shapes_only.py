"""A model made ready to run for shapes alone, its conditional layers among the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from condconv_surgery.meta import meta_state


@contextmanager
def shapes_only(model: nn.Module) -> Iterator[None]:
    """``meta_state``, in which ``torch.is_autocast_enabled("meta")`` says no; by itself torch raises there."""
    ask: Any = torch.is_autocast_enabled

    def answer(*device: str) -> bool:
        return device != ("meta",) and bool(ask(*device))

    torch.is_autocast_enabled = answer  # type: ignore[assignment]
    try:
        with meta_state(model):
            yield
    finally:
        torch.is_autocast_enabled = ask
