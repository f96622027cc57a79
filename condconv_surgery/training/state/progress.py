"""Progress of a run, which a saved state holds, and its result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from condconv_surgery.training.tally import Tally


@dataclass
class Progress:
    """Optimizer steps and scored epochs that are done; ``tally`` is of the epoch that is running.

    best_epoch: the one with the best validation top-1, of equal ones with the smallest loss.
    """

    step: int = 0
    epochs_done: int = 0
    best_top1: float = -1.0
    best_loss: float = math.inf
    best_epoch: int = 0
    tally: Tally = field(default_factory=Tally)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "tally": self.tally.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Progress:
        return cls(**{**data, "tally": Tally.of(**data["tally"])})


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    top1, loss: of the last epoch on the validation images. val_images: those that could be read. stopped_by: the number
    of the signal that ended the run early (15 SIGTERM, 2 Ctrl-C, 1 SIGHUP), 0 when it was completed. heads: widths of
    new classifier heads by name.
    """

    output: str
    epochs: int
    steps: int
    train_images: int
    val_images: int
    classes: tuple[str, ...]
    heads: dict[str, int]
    top1: float | None
    loss: float | None
    best_top1: float | None
    best_epoch: int
    unreadable: tuple[str, ...]
    stopped_by: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes), "unreadable": list(self.unreadable)}
