"""Throughput, memory and temperature of a run; the values of a step and of an epoch for callbacks."""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

from condconv_surgery.layers import routers
from condconv_surgery.training.monitor.callback import EpochRow, StepView
from condconv_surgery.training.state.progress import Progress
from condconv_surgery.training.tally import Tally


class Meter:
    """Measures images and time within an epoch."""

    def __init__(self, device: torch.device, epochs: int, steps: int) -> None:
        self.device, self.epochs, self.steps = device, epochs, steps
        self.restart()

    def restart(self) -> None:
        self.began, self.images, self.training_seconds = time.monotonic(), 0, 0.0

    def count(self, images: int) -> None:
        self.images += images
        self.training_seconds = time.monotonic() - self.began

    @property
    def rate(self) -> float:
        """Training images per second in this epoch, over all processes."""
        return self.images / self.training_seconds if self.training_seconds else 0.0

    def view(self, progress: Progress, lr: float) -> StepView:
        """The step just done, as it is shown."""
        return StepView(
            epoch=progress.epochs_done + 1,
            epochs=self.epochs,
            step=progress.step,
            steps=self.steps,
            tally=progress.tally,
            lr=lr,
            images_per_second=self.rate,
            memory=peak_memory(self.device),
        )

    def row(self, progress: Progress, lr: float, temperature: float | None, scores: Tally, best: bool) -> EpochRow:
        """The epoch just scored, as it is written."""
        return EpochRow(
            epoch=progress.epochs_done,
            step=progress.step,
            lr=lr,
            temperature=temperature,
            train_loss=progress.tally.loss,
            train_top1=progress.tally.top1,
            val_loss=scores.loss,
            val_top1=scores.top1,
            images_per_second=self.rate,
            seconds=time.monotonic() - self.began,
            memory=peak_memory(self.device),
            best=best,
            val_images=int(scores.count),
        )


def temperature_of(model: nn.Module) -> float | None:
    """The temperature of the first router that has one."""
    for router in routers(model).values():
        temperature = getattr(router, "temperature", None)
        if temperature is not None:
            return float(temperature)
    return None


def peak_memory(device: torch.device) -> float | None:
    """Peak memory of this process so far, MB: allocated on its GPU, else resident. ``None`` where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows has no such module
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3  # bytes on macOS, KB elsewhere
