"""Device, precision and memory layout of a measurement."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", Tensor, nn.Module)


@dataclass(frozen=True)
class Setting:
    """device: of weights and images. autocast: dtype of mixed precision, such as ``"bfloat16"``; None for float32."""

    device: str = "cpu"
    autocast: str | None = None
    channels_last: bool = False

    def place(self, what: T) -> T:
        """Move a tensor or module to the device; 4-D tensors also to the memory layout."""
        last = self.channels_last and not (isinstance(what, Tensor) and what.dim() != 4)
        return what.to(self.device, memory_format=torch.channels_last if last else torch.preserve_format)

    def precision(self) -> AbstractContextManager[object]:
        """The autocast context; disabled for float32."""
        dtype = getattr(torch, self.autocast or "bfloat16")
        return torch.autocast(self.device, dtype, enabled=self.autocast is not None)

    @property
    def name(self) -> str:
        """Prefix of file names, only what differs from the default: ``"cuda-bfloat16-last-"``."""
        parts = [self.device if self.device != "cpu" else None, self.autocast, "last" if self.channels_last else None]
        return "".join(f"{part}-" for part in parts if part)


USUAL = Setting()
