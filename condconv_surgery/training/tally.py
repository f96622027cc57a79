"""Sums over images: loss, correct predictions, count. They stay on the device until one of them is read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tally:
    """``sums`` [3], float64: loss, correct predictions, images. Adding needs no synchronisation; a property does."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    @classmethod
    def of(cls, loss_sum: float, right: float, count: float) -> Tally:
        """A tally on the CPU, from plain numbers."""
        return cls(torch.tensor([loss_sum, right, count], dtype=torch.float64))

    @classmethod
    def of_batch(cls, loss_sum: Tensor, logits: Tensor, target: Tensor) -> Tally:
        """One batch: ``loss_sum`` over its images, logits [B, K], and labels [B] or shares of the classes [B, K].

        With shares, the class with the largest share is the right one.
        """
        labels = target if target.dim() == 1 else target.argmax(1)
        right = (logits.argmax(1) == labels).sum()
        count = torch.full_like(right, len(labels))
        return cls(torch.stack([loss_sum.double(), right.double(), count.double()]))

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.sums.to(other.sums.device) + other.sums)

    @property
    def loss_sum(self) -> float:
        """Sum of the losses, nats."""
        return float(self.sums[0])

    @property
    def count(self) -> float:
        """Images."""
        return float(self.sums[2])

    @property
    def loss(self) -> float:
        """Mean loss per image, nats; 0 without images."""
        loss_sum, _, count = self.sums.tolist()
        return loss_sum / count if count else 0.0

    @property
    def top1(self) -> float:
        """Share of correct predictions, 0 to 1; 0 without images."""
        _, right, count = self.sums.tolist()
        return right / count if count else 0.0

    def to_dict(self) -> dict[str, float]:
        """``loss_sum``, ``right`` and ``count``."""
        return dict(zip(("loss_sum", "right", "count"), self.sums.tolist(), strict=True))
